"""A host's identity: one CURVE key pair in a closed folder, its fingerprint, and the name of its system."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import zmq
from filelock import FileLock, Timeout

from transport.errors import ConfigError
from transport.security.curve import KEY_FILE, KeyPair, new_key_pair, read_keys, write_keys
from transport.timeouts import FILE_LOCK_S

_FINGERPRINT_GROUPS = 4


def load_keys(folder: Path) -> KeyPair:
    """The keys in `folder`, made if there are none; several processes may ask at once.

    A folder or file that others could read is closed to them first. Raises ConfigError for a broken file, one that
    belongs to someone else, and a folder that can't be written.
    """
    path = folder / KEY_FILE
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_private(folder, 0o700)
        with FileLock(folder / "keys.lock", timeout=FILE_LOCK_S):
            if not path.exists():
                write_keys(path, new_key_pair())
            _make_private(path, 0o600)
    except Timeout as error:
        raise ConfigError(f"another process holds {folder / 'keys.lock'}", hint="end it, or try again") from error
    except OSError as error:
        raise ConfigError(
            f"this host's keys can't be kept in {folder}: {error.strerror or error}",
            hint="set POTLUCK_HOME to a folder that you can write",
        ) from error
    return _check_pair(read_keys(path), path)


def fingerprint(text: str) -> str:
    """The first 64 bits of the SHA-256 of a public key (or a pool's id): "3f2a-91bc-77d0-12e4"."""
    digits = hashlib.sha256(text.encode()).hexdigest()
    return "-".join(digits[4 * group : 4 * group + 4] for group in range(_FINGERPRINT_GROUPS))


def _make_private(path: Path, mode: int) -> None:
    if os.name != "posix":  # On Windows a user's own folders are closed to other users.
        return
    status = path.stat()
    if status.st_uid != os.getuid():
        raise ConfigError(f"{path} belongs to another user", hint="set POTLUCK_HOME to a folder of your own")
    if status.st_mode & 0o077:
        path.chmod(mode)


def _check_pair(keys: KeyPair, path: Path) -> KeyPair:
    """The same keys. Two halves that do not match would only show as connections that never come up."""
    try:
        derived = zmq.curve_public(keys.secret.encode()).decode()
    except (zmq.ZMQError, ValueError):
        derived = ""
    if derived != keys.public:
        raise ConfigError(
            f"the two keys in {path} do not belong together", hint="delete the file and pair this host anew"
        )
    return keys


MAX_PLATFORM_CHARACTERS = 40

_SYSTEM_NAMES = {"Darwin": "macOS"}
_PROCESSOR_NAMES = {"x86_64": "x86-64", "AMD64": "x86-64", "amd64": "x86-64", "aarch64": "arm64", "ARM64": "arm64"}


def platform_name() -> str:
    """This host's, at most MAX_LENGTH printable ASCII characters: it is told to other hosts."""
    return format_platform(platform.system(), platform.machine(), platform.release())


def format_platform(system: str, machine: str, release: str) -> str:
    """From what Python's `platform` says. A Linux inside Windows is named, since others can't reach it as they would
    a host of its own."""
    words = f"{_SYSTEM_NAMES.get(system, system) or 'unknown'} {_PROCESSOR_NAMES.get(machine, machine)}".strip()
    if system == "Linux" and "microsoft" in release.lower():
        words += " (WSL)"
    return "".join(char for char in words if char.isascii() and char.isprintable())[:MAX_PLATFORM_CHARACTERS]
