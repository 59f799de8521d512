"""The file that keeps a pool's roster: written at once under a lock, read again when it has changed."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
from filelock import FileLock, Timeout

from devices.members import VERSION, Member, Roster, clean_name, own_name
from transport.errors import ConfigError
from transport.private_file import write_private

__all__ = ["Member", "Roster", "RosterFile", "own_name"]

_LOOK_EVERY_S = 0.1
_LOCK_TIMEOUT_S = 10.0
_POOL_ID_BYTES = 16

Result = TypeVar("Result")
Clock = Callable[[], float]


class _Version(msgspec.Struct, frozen=True):
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What the file said, the names of those that count by their keys, and how the file looked from outside."""

    roster: Roster
    names: dict[str, str]
    stamp: tuple[int, int, int]


class RosterFile:
    """The roster at `path`, made when it is first needed, with a random id for the pool.

    Reading costs next to nothing: the file is looked at ten times a second at most, and read when it is another one.
    Any thread may ask; several processes may write. A change made here counts at once, one made elsewhere after 0.1 s.
    """

    def __init__(
        self, path: Path, *, name: str | None = None, clock: Clock = time.time, ticks: Clock = time.monotonic
    ) -> None:
        """`name` is the head's if the file has to be made; None: what the system calls this host."""
        self.path = path
        self._name = clean_name(name) if name is not None else None
        self._clock = clock
        self._ticks = ticks
        self._seen: _Seen | None = None
        self._look_at = 0.0
        self._lock = threading.Lock()

    def read(self) -> Roster:
        """Raises ConfigError if the file is broken, or of a newer version of Potluck."""
        return self._current().roster

    def admits(self, key: str) -> bool:
        """Whether the key is that of a member. Nobody's is while the file can't be read."""
        try:
            return key in self._current().names
        except ConfigError:
            return False

    def problem(self) -> ConfigError | None:
        """Why nobody is admitted now, if the file can't be read."""
        try:
            self.read()
        except ConfigError as error:
            return error
        return None

    def member(self, key: str) -> Member | None:
        """The member with that key; None if there is none, or it is revoked. Raises ConfigError."""
        found = self.read().member(key)
        return None if found is None or found.is_revoked else found

    def name_of(self, key: str) -> str | None:
        """What the member with that key is called. None if there is none, it is revoked, or the file can't be read."""
        try:
            return self._current().names.get(key)
        except ConfigError:
            return None

    def keys(self) -> tuple[str, ...]:
        """Those of the members that count. None do while the file can't be read."""
        try:
            return tuple(self._current().names)
        except ConfigError:
            return ()

    def find(self, name_or_fingerprint: str) -> Member:
        """Raises ConfigError if there is no such member, revoked or not."""
        return self.read().find(name_or_fingerprint)

    def add(self, key: str, name: str, platform: str) -> Member:
        """Take a host in; its name becomes one that nobody else has. Raises ConfigError."""
        return self._change(lambda roster: roster.with_member(key, name, platform, now=self._clock()))

    def rename(self, old: str, new: str) -> None:
        """Give a member, or the head itself, another name. Raises ConfigError."""
        self._change(lambda roster: (roster.renamed(old, new), None))

    def revoke(self, name: str) -> Member:
        """From now on its key counts no more. Raises ConfigError."""
        return self._change(lambda roster: roster.without(name, now=self._clock()))

    def _current(self) -> _Seen:
        seen = self._seen
        now = self._ticks()
        if seen is not None and now < self._look_at:
            return seen
        with self._lock:
            if self._seen is None or now >= self._look_at:
                self._look()
                self._look_at = now + _LOOK_EVERY_S
            assert self._seen is not None
            return self._seen

    def _look(self) -> None:
        try:
            if not self.path.exists():
                self._make()
            stamp = self._stamp()
        except OSError as error:
            raise self._unreadable(error) from error
        if self._seen is None or self._seen.stamp != stamp:
            self._seen = None  # Nobody counts until it is read.
            self._remember(self._load(), stamp)

    def _make(self) -> None:
        with self._locked():
            if not self.path.exists():
                self._write(Roster(version=VERSION, pool=secrets.token_hex(_POOL_ID_BYTES), name=self._own_name()))

    def _change(self, change: Callable[[Roster], tuple[Roster, Result]]) -> Result:
        self.read()
        # Without `_lock`: who only asks must not wait for another process that writes.
        with self._locked():
            roster, result = change(self._load())
            self._write(roster)
            stamp = self._stamp()
        with self._lock:
            self._remember(roster, stamp)
        return result

    def _remember(self, roster: Roster, stamp: tuple[int, int, int]) -> None:
        names = {member.key: member.name for member in roster.members if not member.is_revoked}
        self._seen = _Seen(roster=roster, names=names, stamp=stamp)

    def _load(self) -> Roster:
        try:
            data = self.path.read_bytes()
            version = msgspec.json.decode(data, type=_Version).version
            if version > VERSION:
                raise ConfigError(
                    f"{self.path} was written by a newer Potluck (version {version} of the file, this one knows "
                    f"{VERSION})",
                    hint="update Potluck on this host; the file is left as it is",
                )
            return msgspec.json.decode(data, type=Roster)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"the list of paired devices in {self.path} can't be read: {error}",
            hint="put the file back; or delete it, and pair every device anew",
        )

    def _write(self, roster: Roster) -> None:
        try:
            write_private(self.path, msgspec.json.format(msgspec.json.encode(roster), indent=1))
        except OSError as error:
            raise ConfigError(
                f"the list of paired devices can't be written to {self.path}: {error.strerror or error}",
                hint="make room, or set POTLUCK_HOME to a folder that you can write",
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock"), timeout=_LOCK_TIMEOUT_S):
                yield
        except Timeout as error:
            raise ConfigError(f"another process holds the lock of {self.path}", hint="try again in a moment") from error
        except OSError as error:
            raise ConfigError(
                f"{self.path} can't be written: {error.strerror or error}",
                hint="set POTLUCK_HOME to a folder that you can write",
            ) from error

    def _own_name(self) -> str:
        return self._name if self._name is not None else own_name()

    def _stamp(self) -> tuple[int, int, int]:
        status = self.path.stat()
        return status.st_mtime_ns, status.st_size, status.st_ino
