"""Files that are read from again and again, by several threads, with few of them open at a time."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transport.errors import BadCheckpoint

MOST_OPEN_FILES = 16


@dataclass(slots=True)
class _Open:
    fd: int
    num_readers: int = 0


class OpenFiles:
    """Keeps the files that were read last open, `most` of them and those that are being read."""

    def __init__(self, most: int = MOST_OPEN_FILES) -> None:
        self._most = most
        self._open: OrderedDict[Path, _Open] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def descriptor(self, path: Path, num_bytes: int | None = None) -> Iterator[int]:
        """To read from. Raises BadCheckpoint if the file can't be opened, or has not `num_bytes`."""
        with self._lock:
            one = self._open.get(path)
            if one is None:
                one = self._open[path] = _Open(_opened(path, num_bytes))
            self._open.move_to_end(path)
            one.num_readers += 1
        try:
            yield one.fd
        finally:
            with self._lock:
                one.num_readers -= 1
                self._close_beyond(self._most)

    def close(self) -> None:
        """What is being read right now is closed when that ends."""
        with self._lock:
            self._most = 0
            self._close_beyond(0)

    def _close_beyond(self, most: int) -> None:
        if len(self._open) <= most:
            return
        # The one that was read longest ago comes first.
        idle = (path for path, one in self._open.items() if not one.num_readers)
        while len(self._open) > most and (path := next(idle, None)) is not None:
            os.close(self._open.pop(path).fd)
            idle = (path for path, one in self._open.items() if not one.num_readers)


def _opened(path: Path, num_bytes: int | None) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise BadCheckpoint(
            f"can't open the model's file {path}: {error.strerror}", hint="put it back or pull the model again"
        ) from error
    found = os.fstat(fd).st_size
    if num_bytes is not None and found != num_bytes:
        os.close(fd)
        raise BadCheckpoint(f"{path} has {found:,} bytes, not {num_bytes:,}", hint="remove it, and load again")
    return fd
