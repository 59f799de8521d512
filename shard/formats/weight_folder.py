"""A weight folder reads bytes of a model's weight files: the files themselves, or their beginnings alone."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from transport.errors import BadCheckpoint

# A call can't be interrupted. Under a CPU quota (a container's, a lab's) what one takes beyond it is paid back with all
# threads of the group standing still: to read 500 MB at once silenced a worker on a quarter of a core for seconds.
_MAX_READ_BYTES = 1 << 23
# Without preadv (Windows) a file's position is shared by the threads that read it.
_SEEKING = threading.Lock()


def read_exactly(fd: int, out: np.ndarray, offset: int, what: str) -> None:
    """Fill the contiguous `out` with the file's bytes from `offset` on; `what` names them in an error."""
    view = out.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        part = view[done : done + _MAX_READ_BYTES]
        try:
            count = _read_at(fd, part, offset + done)
        except OSError as error:
            raise BadCheckpoint(f"can't read {what}: {error.strerror}", hint="check the disk") from error
        if count == 0:
            raise BadCheckpoint(
                f"{what} is cut off: {len(view):,} bytes announced, {done:,} there", hint="pull the model again"
            )
        done += count


def _read_at(fd: int, out: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [out], offset)
    with _SEEKING:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(out))
    out[: len(data)] = data
    return len(data)


MAX_OPEN_DESCRIPTORS = 16


@dataclass(slots=True)
class _OpenDescriptor:
    fd: int
    num_readers: int = 0


class DescriptorCache:
    """Keeps the files that were read last open, `most` of them and those that are being read."""

    def __init__(self, max_open: int = MAX_OPEN_DESCRIPTORS) -> None:
        self._max_open = max_open
        self._open: OrderedDict[Path, _OpenDescriptor] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def descriptor(self, path: Path, num_bytes: int | None = None) -> Iterator[int]:
        """To read from. Raises BadCheckpoint if the file can't be opened, or has not `num_bytes`."""
        with self._lock:
            one = self._open.get(path)
            if one is None:
                one = self._open[path] = _OpenDescriptor(_open_descriptor(path, num_bytes))
            self._open.move_to_end(path)
            one.num_readers += 1
        try:
            yield one.fd
        finally:
            with self._lock:
                one.num_readers -= 1
                self._close_beyond(self._max_open)

    def close(self) -> None:
        """What is being read right now is closed when that ends."""
        with self._lock:
            self._max_open = 0
            self._close_beyond(0)

    def _close_beyond(self, most: int) -> None:
        if len(self._open) <= most:
            return
        # The one that was read longest ago comes first.
        idle = (path for path, one in self._open.items() if not one.num_readers)
        while len(self._open) > most and (path := next(idle, None)) is not None:
            os.close(self._open.pop(path).fd)
            idle = (path for path, one in self._open.items() if not one.num_readers)


def _open_descriptor(path: Path, num_bytes: int | None) -> int:
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


class WeightFolder(Protocol):
    """A model's folder as its readers see it. Several threads may read at once."""

    @property
    def path(self) -> Path: ...

    def size_bytes(self, file: str) -> int:
        """Of a whole weight file, however much of it is here. Raises BadCheckpoint if the model has no such file."""
        ...

    def read(self, file: str, out: np.ndarray, offset: int, what: str) -> None:
        """Fill the contiguous `out` with the file's bytes from `offset` on; `what` names them in an error.

        Raises BadCheckpoint.
        """
        ...

    def close(self) -> None: ...


class PlainFolder:
    """The files themselves. A file may also be named by its absolute path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = DescriptorCache()

    def size_bytes(self, file: str) -> int:
        with self._files.descriptor(self.path / file) as fd:
            return os.fstat(fd).st_size

    def read(self, file: str, out: np.ndarray, offset: int, what: str) -> None:
        with self._files.descriptor(self.path / file) as fd:
            read_exactly(fd, out, offset, what)

    def close(self) -> None:
        self._files.close()


class HeaderFolder:
    """Only the beginnings of the files are in `path`, of which the whole ones have `sizes`. The rest reads as zeros."""

    def __init__(self, path: Path, sizes: Mapping[str, int]) -> None:
        self.path = path
        self._sizes = sizes

    def size_bytes(self, file: str) -> int:
        return self._sizes[file]

    def read(self, file: str, out: np.ndarray, offset: int, what: str) -> None:
        out.fill(0)

    def close(self) -> None:
        pass
