"""The API key is 256 bits in a file that only this user can read, made once and kept over restarts."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from potluck.system.paths import home_dir
from transport.errors import ConfigError
from transport.process.files import write_atomic

PREFIX = "sk-potluck-"
_KEY = re.compile(re.escape(PREFIX) + r"[A-Za-z0-9_-]{43}")
_BITS = 256
_HINT = "make a new one: potluck key --new"
_CHECK_INTERVAL_S = 0.5
SECRET_HEADER = "X-Potluck-Secret"


def key_file() -> Path:
    return home_dir() / "api-key"


def read_key() -> str | None:
    """The key of this user's heads, None if there is none. Raises ConfigError for a file that holds no key, or that
    others could have read."""
    path = key_file()
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(200).decode("ascii", "replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(
            f"{path} can't be read: {error.strerror}", hint="make a new one: potluck key --new"
        ) from error
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(f"{path} is open to other users", hint=_HINT)
    if not _KEY.fullmatch(text):
        raise ConfigError(f"{path} holds no key", hint=_HINT)
    return text


def make_key() -> str:
    """A new key in the place of the one before, which running heads then no longer take. Raises ConfigError."""
    key = PREFIX + secrets.token_urlsafe(_BITS // 8)
    path = key_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, f"{key}\n".encode())
    except OSError as error:
        raise ConfigError(
            f"{path} can't be written: {error.strerror}", hint="set POTLUCK_HOME to a folder that you can write"
        ) from error
    return key


class KeyWatch:
    """The key as its file has it now, looked up at most twice a second: `potluck key --new` needs no word to the head.

    Nothing is right while the file is missing or broken. Only digests are kept and compared, in constant time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._checked_s = -_CHECK_INTERVAL_S
        self._stamp: tuple[int, int, int] | None = None
        self._digest: bytes | None = None

    def is_right(self, presented: bytes) -> bool:
        self._reload()
        return self._digest is not None and hmac.compare_digest(self._digest, _digest_of(presented))

    def _reload(self) -> None:
        now = self._clock()
        if now - self._checked_s < _CHECK_INTERVAL_S:
            return
        self._checked_s = now
        try:
            status = key_file().stat()
        except OSError:
            self._stamp = self._digest = None
            return
        seen = (status.st_ino, status.st_mtime_ns, status.st_mode)
        if seen == self._stamp:
            return
        self._stamp, self._digest = seen, None
        try:
            key = read_key()
        except ConfigError:
            return
        self._digest = None if key is None else _digest_of(key.encode())


def _digest_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
