"""A file of this user alone is replaced at once: a reader sees the old or the new one, never half of it."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

_TRIES = 10
_PAUSE_S = 0.02


def write_private(path: Path, data: bytes) -> None:
    """Raises OSError, and leaves nothing then. Writers of one file have to keep each other out."""
    new = path.with_suffix(f".{os.getpid()}")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _replace(new, path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def _replace(new: Path, path: Path) -> None:
    for attempt in range(_TRIES):
        try:
            new.replace(path)
            return
        except PermissionError:  # On Windows, while someone reads the old one.
            if attempt == _TRIES - 1:
                raise
            time.sleep(_PAUSE_S)
