"""A weight folder reads bytes of a model's weight files, from the files themselves or from pieces in a store."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from transport.errors import BadCheckpoint
from transport.messages.pieces import MAX_PIECE_BYTES, ListedFile, Piece, PieceList, PlacedPiece
from transport.pieces.store import PieceStore

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


_AHEAD_BYTES = 32 << 20
# To find a file on a cold disk takes as long as to read a small one: several are looked for at once.
_AHEAD_THREADS = 4
_TOGETHER_BYTES = 1 << 20
_CAN_READ_AHEAD = hasattr(os, "sendfile") and sys.platform == "linux"

FetchPiece = Callable[[Piece], None]
"""Puts the piece into the store, or raises a PotluckError."""


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


OPENING_PIECES = "kept"
"""The folder, beside the small files, of the nameless pieces of weight files: what opening the model looks at."""


class PieceFolder:
    """The weight files of `pieces`, read from a store; `path` is what `write_metadata_from_store` made.

    A piece that the store lacks is asked for from `fetch`, without which it is an error: nothing is ever made up.
    Without a store the model can be opened, and none of its tensors read.
    """

    def __init__(
        self, path: Path, pieces: PieceList, store: PieceStore | None, *, fetch: FetchPiece | None = None
    ) -> None:
        self.path = path
        self._store = store
        self._fetch = fetch
        self._listed = {file.name: file for file in pieces.files}
        self._starts = {file.name: [piece.offset for piece in file.pieces] for file in pieces.files}
        self._files = DescriptorCache()
        self._ahead_to: dict[str, int] = {}
        self._ahead = ThreadPoolExecutor(_AHEAD_THREADS, thread_name_prefix="read-ahead")
        self._paths: dict[str, Path] = {}  # To make one takes longer than to open the file.

    def size_bytes(self, file: str) -> int:
        return self._file(file).num_bytes

    def read(self, file: str, out: np.ndarray, offset: int, what: str) -> None:
        listed = self._file(file)
        view = out.reshape(-1).view(np.uint8)
        done = 0
        index = max(0, bisect_right(self._starts[file], offset) - 1)
        while done < view.size:
            piece = listed.pieces[index] if index < len(listed.pieces) else None
            begin = offset + done
            if piece is None or not piece.offset <= begin < piece.offset + piece.num_bytes:
                raise BadCheckpoint(
                    f"{what}: no piece of the model has byte {begin:,} of {file}", hint="share the model anew"
                )
            self._schedule_read_ahead(listed, index)
            count = min(view.size - done, piece.offset + piece.num_bytes - begin)
            self._read_piece(piece, view[done : done + count], begin - piece.offset, what)
            done += count
            index += 1

    def close(self) -> None:
        self._ahead.shutdown(cancel_futures=True)
        self._files.close()

    def _schedule_read_ahead(self, file: ListedFile, index: int) -> None:
        """Have the system read the pieces that follow: within a file it does so by itself, from one to the next it does
        not. Two threads may do it twice, which costs little."""
        number = max(index + 1, self._ahead_to.get(file.name, 0))
        if self._store is None or not _CAN_READ_AHEAD or number >= len(file.pieces):
            return
        end = file.pieces[index].offset + file.pieces[index].num_bytes
        if file.pieces[number].offset - end >= _AHEAD_BYTES // 2:
            return
        together, num_bytes = [], 0
        while number < len(file.pieces) and file.pieces[number].offset - end < _AHEAD_BYTES:
            piece = file.pieces[number]
            number += 1
            if piece.tensor:
                together.append(self._stored(piece.digest, self._store))
                num_bytes += piece.num_bytes
            if num_bytes >= _TOGETHER_BYTES:
                self._read_ahead(together)
                together, num_bytes = [], 0
        self._ahead_to[file.name] = number
        self._read_ahead(together)

    def _read_ahead(self, paths: Sequence[Path]) -> None:
        with contextlib.suppress(RuntimeError):  # It was closed meanwhile.
            self._ahead.submit(_to_page_cache, paths)

    def _file(self, name: str) -> ListedFile:
        file = self._listed.get(name)
        if file is None:
            raise BadCheckpoint(f"the model in {self.path} has no file {name}", hint="share the model anew")
        return file

    def _read_piece(self, piece: PlacedPiece, out: np.ndarray, offset: int, what: str) -> None:
        path = self._path(piece, what)
        with self._files.descriptor(path, piece.num_bytes) as fd:
            read_exactly(fd, out, offset, what)

    def _stored(self, digest: str, store: PieceStore) -> Path:
        path = self._paths.get(digest)
        if path is None:
            path = self._paths[digest] = store.path(digest)
        return path

    def _path(self, piece: PlacedPiece, what: str) -> Path:
        if not piece.tensor:
            return self.path / OPENING_PIECES / piece.digest
        path = None if self._store is None else self._stored(piece.digest, self._store)
        if path is None or (self._fetch is None and not path.exists()):
            raise BadCheckpoint(
                f"{what}: piece {piece.digest[:12]} is not on this host",
                hint="it was removed meanwhile (potluck cache clear?): load the model again",
            )
        if self._fetch is not None and not path.exists():
            self._fetch(Piece(piece.digest, piece.num_bytes))
        return path


def _is_cached(fd: int) -> bool:
    """Whether the file's last byte is in the system's page cache, as far as the file system tells."""
    try:
        os.preadv(fd, [bytearray(1)], max(0, os.fstat(fd).st_size - 1), os.RWF_NOWAIT)
    except OSError:
        return False
    return True


def _to_page_cache(paths: Sequence[Path]) -> None:
    """Have the files read into the system's page cache, as far as they are there.

    To send them nowhere copies nothing, and reads as it does for who reads one after the other: in large pages. What is
    advised to be read (POSIX_FADV_WILLNEED) comes in small ones, which take twice the processor's time.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for path in paths:
            with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
                if not _is_cached(file.fileno()):
                    while os.sendfile(nowhere, file.fileno(), None, MAX_PIECE_BYTES):
                        pass
    finally:
        os.close(nowhere)
