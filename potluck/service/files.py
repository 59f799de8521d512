"""Writing a service's file: at once, and never through a link."""

from __future__ import annotations

import os
from pathlib import Path

from transport.errors import ConfigError


def write_new(path: Path, content: bytes) -> None:
    """Raises ConfigError. What is there already is replaced; a link itself is, not what it leads to."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(
            f"{path} can't be written: {error.strerror}", hint="--dry-run prints what would be written there"
        ) from error


def remove_file(path: Path) -> bool:
    """Whether it was there. Raises ConfigError."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"{path} can't be removed: {error.strerror}", hint="remove it by hand") from error
    return True
