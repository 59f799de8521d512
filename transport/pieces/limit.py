"""How much a store of pieces may hold, as its user has set it: a file in its folder, which every process looks at."""

from __future__ import annotations

from pathlib import Path

import msgspec

from transport.errors import ConfigError
from transport.pieces.disk_space import translated_write_errors

_FILE = "limit.json"


class _Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    limit_bytes: int | None


def read_limit(root: Path) -> int | None:
    """None without a limit. Raises ConfigError for a file that can't be understood."""
    path = root / _FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Limit).limit_bytes
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path} can't be read: {error}", hint="set it again: potluck cache --limit 50GB") from error


def write_limit(root: Path, limit_bytes: int | None) -> None:
    with translated_write_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        new = root / f"{_FILE}.new"
        new.write_bytes(msgspec.json.encode(_Limit(limit_bytes)))
        new.replace(root / _FILE)
