"""The roster lists the hosts of a pool; its file is written at once under a lock and read when it changes."""

from __future__ import annotations

import re
import secrets
import socket
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
from filelock import FileLock, Timeout
from msgspec import Struct
from msgspec.structs import replace

from devices.pairing.identity import fingerprint
from transport.errors import ConfigError
from transport.process.files import write_atomic
from transport.timeouts import FILE_LOCK_S

ROSTER_VERSION = 1
MAX_NAME_CHARACTERS = 40
_NOT_IN_A_NAME = re.compile(r"[^\w.-]+")
_SHORTEST_FINGERPRINT = 4


class Member(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A host that paired, at `paired_at` (seconds since 1970). After `revoked_at` it counts no more."""

    key: str
    name: str
    paired_at: float
    platform: str
    revoked_at: float | None = None

    @property
    def is_revoked(self) -> bool:
        return self.revoked_at is not None


class Roster(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pool: its id (32 hex digits), what its head is called, and its members, the revoked ones too."""

    version: int
    pool: str
    name: str
    members: tuple[Member, ...] = ()

    def member(self, key: str) -> Member | None:
        """Whoever has the key, revoked or not."""
        return next((member for member in self.members if member.key == key), None)

    def find(self, text: str) -> Member:
        """By name, or by the beginning of a fingerprint (at least 4 digits). Raises ConfigError if it is nobody's or
        several members'."""
        named = [member for member in self.members if member.name == text]
        digits = text.lower().replace("-", "")
        if not named and len(digits) >= _SHORTEST_FINGERPRINT:
            named = [m for m in self.members if fingerprint(m.key).replace("-", "").startswith(digits)]
        if len(named) == 1:
            return named[0]
        names = ", ".join(member.name for member in self.members)
        if named:
            raise ConfigError(f"{text!r} fits {len(named)} devices", hint="write more of its fingerprint")
        raise ConfigError(
            f"no device of this pool is called {text!r}",
            hint=f"the devices are: {names}" if names else "none has paired so far; see: potluck invite",
        )

    def with_member(self, key: str, name: str, platform: str, *, now: float) -> tuple[Roster, Member]:
        """The roster with that host in it. One that is in it keeps its name; a revoked one counts anew."""
        known = self.member(key)
        wished = known.name if known is not None and not known.is_revoked else clean_name(name)
        others = tuple(member for member in self.members if member.key != key)
        taken = {self.name, *(member.name for member in others)}
        added = Member(key=key, name=_unique_name(wished, taken), paired_at=now, platform=clean_text(platform))
        return replace(self, members=(*others, added)), added

    def renamed(self, old: str, new: str) -> Roster:
        """With another name for a member or, if `old` is its name, for the head. Raises ConfigError."""
        wanted = checked_name(new)
        if wanted in {self.name, *(member.name for member in self.members)}:
            raise ConfigError(f"{wanted} is the name of another device of this pool", hint="choose another name")
        if old == self.name:
            return replace(self, name=wanted)
        return self._with_changed(replace(self.find(old), name=wanted))

    def without(self, name: str, *, now: float) -> tuple[Roster, Member]:
        """With that member revoked. Raises ConfigError if there is none, or it is revoked already."""
        member = self.find(name)
        if member.is_revoked:
            raise ConfigError(f"{member.name} is revoked already", hint="see: potluck devices")
        revoked = replace(member, revoked_at=now)
        return self._with_changed(revoked), revoked

    def _with_changed(self, changed: Member) -> Roster:
        return replace(self, members=tuple(changed if m.key == changed.key else m for m in self.members))


def clean_name(text: str) -> str:
    """A name as a host proposes it, made fit to be printed, typed and looked at: letters, digits and "._-"."""
    name = _NOT_IN_A_NAME.sub("-", unicodedata.normalize("NFC", text).strip())
    return name.strip("-.")[:MAX_NAME_CHARACTERS].rstrip("-.") or "host"


def checked_name(text: str) -> str:
    """A name as a user types it. Raises ConfigError for one that can't be one."""
    name = text.strip()
    if clean_name(name) != name:
        raise ConfigError(
            f"{text!r} is no name for a device",
            hint=f"use letters, digits, dots and dashes, at most {MAX_NAME_CHARACTERS} of them",
        )
    return name


def clean_text(text: str) -> str:
    """Words of another host, such as its platform, without what would command a terminal or be taken for markup."""
    shown = "".join(char for char in text if char.isprintable() and char not in "[]\\")
    return " ".join(shown.split())[:MAX_NAME_CHARACTERS]


def default_host_name() -> str:
    """What the system calls this host, without the network's suffix."""
    return clean_name(socket.gethostname().removesuffix(".local").removesuffix(".lan"))


def _unique_name(name: str, taken: set[str]) -> str:
    return next(candidate for candidate in _candidate_names(name) if candidate not in taken)


def _candidate_names(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        suffix = f"-{number}"
        yield name[: MAX_NAME_CHARACTERS - len(suffix)] + suffix
        number += 1


__all__ = ["Member", "Roster", "RosterFile", "default_host_name"]

_CHECK_INTERVAL_S = 0.1
_POOL_ID_BYTES = 16

Result = TypeVar("Result")
Clock = Callable[[], float]


class _RosterFileVersion(msgspec.Struct, frozen=True):
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _RosterSnapshot:
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
        self, path: Path, *, name: str | None = None, clock: Clock = time.time, monotonic: Clock = time.monotonic
    ) -> None:
        """`name` is the head's if the file has to be made; None: what the system calls this host."""
        self.path = path
        self._name = clean_name(name) if name is not None else None
        self._clock = clock
        self._monotonic = monotonic
        self._snapshot: _RosterSnapshot | None = None
        self._check_at = 0.0
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

    def _current(self) -> _RosterSnapshot:
        seen = self._snapshot
        now = self._monotonic()
        if seen is not None and now < self._check_at:
            return seen
        with self._lock:
            if self._snapshot is None or now >= self._check_at:
                self._refresh()
                self._check_at = now + _CHECK_INTERVAL_S
            assert self._snapshot is not None
            return self._snapshot

    def _refresh(self) -> None:
        try:
            if not self.path.exists():
                self._make()
            stamp = self._stamp()
        except OSError as error:
            raise self._unreadable(error) from error
        if self._snapshot is None or self._snapshot.stamp != stamp:
            self._snapshot = None  # Nobody counts until it is read.
            self._remember(self._load(), stamp)

    def _make(self) -> None:
        with self._locked():
            if not self.path.exists():
                self._write(
                    Roster(version=ROSTER_VERSION, pool=secrets.token_hex(_POOL_ID_BYTES), name=self._head_name())
                )

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
        self._snapshot = _RosterSnapshot(roster=roster, names=names, stamp=stamp)

    def _load(self) -> Roster:
        try:
            data = self.path.read_bytes()
            version = msgspec.json.decode(data, type=_RosterFileVersion).version
            if version > ROSTER_VERSION:
                raise ConfigError(
                    f"{self.path} was written by a newer Potluck (version {version} of the file, this one knows "
                    f"{ROSTER_VERSION})",
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
            write_atomic(self.path, msgspec.json.format(msgspec.json.encode(roster), indent=1))
        except OSError as error:
            raise ConfigError(
                f"the list of paired devices can't be written to {self.path}: {error.strerror or error}",
                hint="make room, or set POTLUCK_HOME to a folder that you can write",
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock"), timeout=FILE_LOCK_S):
                yield
        except Timeout as error:
            raise ConfigError(f"another process holds the lock of {self.path}", hint="try again in a moment") from error
        except OSError as error:
            raise ConfigError(
                f"{self.path} can't be written: {error.strerror or error}",
                hint="set POTLUCK_HOME to a folder that you can write",
            ) from error

    def _head_name(self) -> str:
        return self._name if self._name is not None else default_host_name()

    def _stamp(self) -> tuple[int, int, int]:
        status = self.path.stat()
        return status.st_mtime_ns, status.st_size, status.st_ino
