"""Who is in the pool: the head's list of paired hosts, as values. `devices.roster` keeps it in a file."""

from __future__ import annotations

import re
import socket
import unicodedata
from collections.abc import Iterator

from msgspec import Struct
from msgspec.structs import replace

from devices.identity import fingerprint
from transport.errors import ConfigError

VERSION = 1
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
        added = Member(key=key, name=_unique(wished, taken), paired_at=now, platform=clean_words(platform))
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


def clean_words(text: str) -> str:
    """Words of another host, such as its platform, without what would command a terminal or be taken for markup."""
    shown = "".join(char for char in text if char.isprintable() and char not in "[]\\")
    return " ".join(shown.split())[:MAX_NAME_CHARACTERS]


def own_name() -> str:
    """What the system calls this host, without the network's suffix."""
    return clean_name(socket.gethostname().removesuffix(".local").removesuffix(".lan"))


def _unique(name: str, taken: set[str]) -> str:
    return next(candidate for candidate in _candidates(name) if candidate not in taken)


def _candidates(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        suffix = f"-{number}"
        yield name[: MAX_NAME_CHARACTERS - len(suffix)] + suffix
        number += 1
