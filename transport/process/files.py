"""Files that several processes use: replaced at once, known by a stamp, and kept open by who reads them often."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_REPLACE_TRIES = 10
_REPLACE_PAUSE_S = 0.02


def write_atomic(path: Path, data: bytes, *, private: bool = True) -> None:
    """Replace the file at once: a reader sees the old or the new one, never half of it, whatever crashes. Several
    writers may do so at the same time: the last one counts. `private`: no other user may ever read it.

    A link itself is replaced, not what it leads to. Raises OSError, and leaves nothing then.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(new, flags, 0o600 if private else 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _replace(new, path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def _replace(new: Path, path: Path) -> None:
    for attempt in range(_REPLACE_TRIES):
        try:
            new.replace(path)
            return
        except PermissionError:  # On Windows, while someone reads the old one.
            if attempt == _REPLACE_TRIES - 1:
                raise
            time.sleep(_REPLACE_PAUSE_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStamp:
    """What tells whether a file has changed."""

    num_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Raises OSError."""
        status = path.stat()
        return cls(num_bytes=status.st_size, mtime_ns=status.st_mtime_ns)


class OpenFileCache:
    """Reads ranges of files; keeps the last `max_files` open. One owner thread."""

    def __init__(self, max_files: int = 32) -> None:
        self._max_files = max_files
        self._open: OrderedDict[Path, tuple[int, tuple[int, int, int]]] = OrderedDict()

    def read(self, path: Path, offset: int, num_bytes: int) -> bytes:
        """Fewer bytes only where the file ends. Raises OSError."""
        descriptor = self._descriptor(path)
        if not hasattr(os, "pread"):  # Windows
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.read(descriptor, num_bytes)
        return os.pread(descriptor, num_bytes, offset)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1][0])

    def _descriptor(self, path: Path) -> int:
        found = path.stat()
        # A file that was replaced has the same path.
        identity = (found.st_ino, found.st_size, found.st_mtime_ns)
        known = self._open.pop(path, None)
        if known is not None and known[1] != identity:
            os.close(known[0])
            known = None
        if known is None:
            known = (os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), identity)
        self._open[path] = known
        while len(self._open) > self._max_files:
            os.close(self._open.popitem(last=False)[1][0])
        return known[0]
