"""The file of known pools says which pools a host may join again, and how to be sure that it is them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout
from msgspec import Struct

from devices.pairing.identity import fingerprint
from transport.errors import ConfigError
from transport.process.files import write_atomic
from transport.timeouts import FILE_LOCK_S

_VERSION = 1
_MAX_DOORS = 8


class KnownPool(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pool's id, its head's public key and name, what this host is called there, and where its pairing server has
    been, the latest place first ("HOST:PORT")."""

    pool: str
    key: str
    name: str
    my_name: str
    doors: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """What the pool is known by on the network."""
        return fingerprint(self.pool)

    def at(self, address: str) -> KnownPool:
        """The same pool, last seen at `address`."""
        others = tuple(known for known in self.doors if known != address)
        return msgspec.structs.replace(self, doors=(address, *others)[:_MAX_DOORS])


class _KnownPoolsFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int
    pools: tuple[KnownPool, ...]


class _KnownPoolsVersion(Struct, frozen=True):
    version: int


def load_known_pools(path: Path) -> tuple[KnownPool, ...]:
    """The last joined first; none if there is no file. Raises ConfigError for a broken or a newer one."""
    try:
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=_KnownPoolsVersion).version
        if version > _VERSION:
            raise ConfigError(
                f"{path} was written by a newer Potluck (version {version} of the file, this one knows {_VERSION})",
                hint="update Potluck on this host; the file is left as it is",
            )
        return msgspec.json.decode(data, type=_KnownPoolsFile).pools
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the list of known pools in {path} can't be read: {error}",
            hint="put the file back; or delete it, and pair this host anew",
        ) from error


def save_known_pool(path: Path, pool: KnownPool) -> None:
    """Remember it as the last joined. A head is known by its key: another key is another pool, whatever id it claims.

    Raises ConfigError.
    """
    with _locked(path):
        others = tuple(known for known in load_known_pools(path) if known.key != pool.key)
        _write(path, (pool, *others))


def forget_known_pool(path: Path, text: str | None = None) -> KnownPool:
    """Forget the pool whose head has that name, or whose id or head's key has that fingerprint; None: the only one.

    Raises ConfigError if there is none, or several.
    """
    with _locked(path):
        pools = load_known_pools(path)
        fitting = [pool for pool in pools if text is None or text in _names(pool)]
        if len(fitting) != 1:
            raise _ambiguous_pool(text, pools, fitting)
        _write(path, tuple(pool for pool in pools if pool is not fitting[0]))
        return fitting[0]


def _names(pool: KnownPool) -> tuple[str, ...]:
    return pool.name, pool.pool, pool.fingerprint, fingerprint(pool.key)


def _ambiguous_pool(text: str | None, pools: tuple[KnownPool, ...], fitting: list[KnownPool]) -> ConfigError:
    if not pools:
        return ConfigError("this host has not joined any pool", hint="see: potluck join --help")
    known = ", ".join(f"{pool.name} (key {fingerprint(pool.key)})" for pool in pools)
    problem = "several pools are known" if len(fitting) > 1 else f"no pool {text!r} is known"
    return ConfigError(problem, hint=f"say which by its head's name or its head's key's fingerprint: {known}")


def _write(path: Path, pools: tuple[KnownPool, ...]) -> None:
    file = _KnownPoolsFile(version=_VERSION, pools=pools)
    write_atomic(path, msgspec.json.format(msgspec.json.encode(file), indent=1))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=FILE_LOCK_S):
            yield
    except Timeout as error:
        raise ConfigError(f"another process holds the lock of {path}", hint="try again in a moment") from error
    except OSError as error:
        raise ConfigError(
            f"{path} can't be written: {error.strerror or error}",
            hint="make room, or set POTLUCK_HOME to a folder that you can write",
        ) from error
