"""Credentials let a host pair once: a short code to type, or an invite to paste."""

from __future__ import annotations

import re
import secrets
import threading
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qs, urlencode, urlsplit

from transport.errors import ConfigError
from transport.security.curve import is_key
from transport.timeouts import CODE_LIFETIME_S, INVITE_LIFETIME_S

MAX_GUESSES = 3

CredentialKind = Literal["code", "invite"]
RefusalReason = Literal["wrong", "used", "expired", "locked", "none", "version", "busy"]
"""Why a head does not pair: the secret is wrong, was used, is too old, was guessed at too often, or there is none; the
host speaks another version; too many want to pair at once."""

# Digits and letters that are hard to mix up; those left out are read as what they look like. 32 of them: 5 bits each.
_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LOOKALIKES = str.maketrans("OIL", "011")
_CODE_CHARACTERS = 8
_TOKEN_BYTES = 16
_TOKEN = re.compile(r"[0-9a-f]{32}")
_SCHEME = "potluck"


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """40 bits to type: `text` as it is shown, "7K3M-9XQ2"."""

    text: str = field(repr=False)
    lifetime_s: float = CODE_LIFETIME_S

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Invite:
    """Where a head's pairing server is, its public key, a token of 128 bits, and its pool's id."""

    host: str
    port: int
    key: str
    token: str = field(repr=False)
    pool: str
    lifetime_s: float = INVITE_LIFETIME_S

    @property
    def url(self) -> str:
        query = urlencode({"key": self.key, "token": self.token, "pool": self.pool})
        return f"{_SCHEME}://{self.host}:{self.port}?{query}"

    def __str__(self) -> str:
        return self.url


def parse_code(text: str) -> str:
    """A code as a user types it, in one form: "7k3m 9xq2" is "7K3M-9XQ2". Raises ConfigError."""
    typed = re.sub(r"[\s-]", "", text).upper().translate(_LOOKALIKES)
    if len(typed) != _CODE_CHARACTERS or not set(typed) <= set(_ALPHABET):
        raise ConfigError(
            f"{text!r} is not a code", hint=f"a code has {_CODE_CHARACTERS} letters and digits, such as 7K3M-9XQ2"
        )
    return _format_code(typed)


def parse_invite(text: str) -> Invite:
    """Raises ConfigError for what is no invite, or not all of one."""
    try:
        parts = urlsplit(text.strip())
        fields = parse_qs(parts.query, strict_parsing=True, max_num_fields=8)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise _invalid_invite(text) from None
    if parts.scheme != _SCHEME or not host or not port or parts.path.strip("/"):
        raise _invalid_invite(text)
    key, token, pool = (fields.get(name, [""])[0] for name in ("key", "token", "pool"))
    if not is_key(key) or not _TOKEN.fullmatch(token) or not re.fullmatch(r"[0-9a-f]{32}", pool):
        raise _invalid_invite(text)
    return Invite(host=host, port=port, key=key, token=token, pool=pool)


def is_invite(text: str) -> bool:
    """Whether a user meant it as an invite."""
    return text.strip().lower().startswith(f"{_SCHEME}://")


@dataclass(slots=True)
class _Secret:
    """One that the head gave out at `made_at`."""

    text: str = field(repr=False)
    made_at: float
    lifetime_s: float
    max_guesses: int | None
    guesses: int = 0
    is_used: bool = False

    def is_expired(self, now: float) -> bool:
        return now - self.made_at >= self.lifetime_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PairingAttempt:
    """An exchange under way, and the secret that the other side has to know."""

    kind: CredentialKind
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairingRefusal:
    """Why an attempt failed; `guesses_left` says how many more there can be for this code."""

    reason: RefusalReason
    guesses_left: int = 0


class PairingCodes:
    """The code and the invite that a head has given out last, each good for one pairing. Any thread may use it.

    A code is locked after three guesses. One is counted before it is answered: who breaks off then has guessed too.
    Nobody guesses 128 bits, so that guesses at an invite are not counted: that would let anyone lock it.
    """

    def __init__(self) -> None:
        self._secrets: dict[CredentialKind, _Secret] = {}
        self._lock = threading.Lock()

    def new_code(self, *, now: float) -> Code:
        """The code before is void."""
        text = _format_code("".join(secrets.choice(_ALPHABET) for _ in range(_CODE_CHARACTERS)))
        with self._lock:
            self._secrets["code"] = _Secret(text, now, CODE_LIFETIME_S, MAX_GUESSES)
        return Code(text=text)

    def new_invite(self, host: str, port: int, *, key: str, pool: str, now: float) -> Invite:
        """The invite before is void."""
        token = secrets.token_hex(_TOKEN_BYTES)
        with self._lock:
            self._secrets["invite"] = _Secret(token, now, INVITE_LIFETIME_S, None)
        return Invite(host=host, port=port, key=key, token=token, pool=pool)

    def begin(self, kind: CredentialKind, *, now: float) -> PairingAttempt | PairingRefusal:
        """Count a guess."""
        with self._lock:
            secret = self._secrets.get(kind)
            if secret is None:
                return PairingRefusal(reason="none")
            if secret.is_used:
                return PairingRefusal(reason="used")
            if secret.is_expired(now):
                return PairingRefusal(reason="expired")
            if secret.max_guesses is not None and secret.guesses >= secret.max_guesses:
                return PairingRefusal(reason="locked")
            secret.guesses += 1
            return PairingAttempt(kind=kind, secret=secret.text)

    def cancel(self, attempt: PairingAttempt) -> None:
        """The head has not answered: nothing was guessed."""
        with self._lock:
            secret = self._secrets.get(attempt.kind)
            if secret is not None and secret.text == attempt.secret:
                secret.guesses -= 1

    def verify(self, attempt: PairingAttempt, *, is_right: bool, now: float) -> PairingRefusal | None:
        """What came of it. None: the secret was known, and now is used."""
        with self._lock:
            secret = self._secrets.get(attempt.kind)
            if secret is None or secret.text != attempt.secret or secret.is_expired(now):
                return PairingRefusal(reason="expired")
            if not is_right:
                left = 0 if secret.max_guesses is None else secret.max_guesses - secret.guesses
                is_locked = secret.max_guesses is not None and left <= 0
                return PairingRefusal(reason="locked" if is_locked else "wrong", guesses_left=left)
            if secret.is_used:
                return PairingRefusal(reason="used")
            secret.is_used = True
            return None


def _format_code(code: str) -> str:
    return f"{code[:4]}-{code[4:]}"


def _invalid_invite(text: str) -> ConfigError:
    shown = text if len(text) <= 40 else f"{text[:39]}…"  # Not the token.
    return ConfigError(
        f"{shown!r} is not an invite",
        hint='copy all of what the head prints, "potluck://…", and put it in quotes',
    )
