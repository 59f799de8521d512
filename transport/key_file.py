"""The file with a host's CURVE keys, for the processes that are told where it is."""

from __future__ import annotations

from pathlib import Path

import msgspec

from transport.curve import KeyPair, is_key
from transport.errors import ConfigError
from transport.private_file import write_private

KEY_FILE = "keys.json"


def read_keys(path: Path) -> KeyPair:
    """Raises ConfigError if it can't be read or holds no keys."""
    try:
        keys = msgspec.json.decode(path.read_bytes(), type=KeyPair)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"this host's keys in {path} can't be read: {error}",
            hint="put the file back; without it, delete it and pair this host anew",
        ) from error
    if not is_key(keys.public) or not is_key(keys.secret):
        raise ConfigError(f"{path} holds no keys", hint="put the file back; or delete it and pair this host anew")
    return keys


def write_keys(path: Path, keys: KeyPair) -> None:
    """For this user alone, at once. Raises OSError."""
    write_private(path, msgspec.json.encode(keys))
