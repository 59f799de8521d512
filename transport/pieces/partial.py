"""A piece that is coming in: a `.part` file that any later fetch, of any process, goes on with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from transport.errors import WrongBytes
from transport.pieces.disk_space import translated_write_errors
from transport.pieces.piece import Piece

_READ_BYTES = 1 << 20


class PartialPiece:
    """The first `num_bytes` bytes of a piece, on the disk. One process at a time has it. Owned by one thread."""

    def __init__(self, piece: Piece, part: Path, whole: Path, lock: BaseFileLock, on_committed: Callable[[], None]):
        """`lock` is held, and let go of with `close`, `commit` or an error."""
        self._piece = piece
        self._part = part
        self._whole = whole
        self._lock = lock
        self._on_committed = on_committed
        self._hash = hashlib.sha256()
        self._num_bytes = 0
        self._fd = -1
        try:
            with translated_write_errors(part.parent):
                self._fd = os.open(part, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
                self._take_up()
        except BaseException:
            self.close()
            raise

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def write(self, data: memoryview | bytes) -> None:
        """Append `data`. Raises NoSpace; what was written of it stays. Raises WrongBytes for more than there are."""
        if self._num_bytes + len(data) > self._piece.num_bytes:
            raise WrongBytes(f"piece {self._piece.digest[:12]} has {self._piece.num_bytes:,} bytes, and more came")
        rest = memoryview(data)
        with translated_write_errors(self._part.parent):
            while rest:
                count = os.write(self._fd, rest)
                self._hash.update(rest[:count])
                self._num_bytes += count
                rest = rest[count:]

    def commit(self) -> None:
        """It is whole: into the store with it, for good. Raises WrongBytes, with what was there removed."""
        found = self._hash.hexdigest()
        if self._num_bytes != self._piece.num_bytes or found != self._piece.digest:
            self._remove()
            raise WrongBytes(
                f"what came for piece {self._piece.digest[:12]} of {self._piece.num_bytes:,} bytes are "
                f"{self._num_bytes:,} bytes with the SHA-256 {found[:12]}"
            )
        with translated_write_errors(self._part.parent):
            # Nobody checks it again: after a power cut its name must not stand for bytes that were never written.
            os.fsync(self._fd)
            self._close_file()
            self._part.replace(self._whole)
        self.close()
        # Who waits for the lock finds the piece there, and needs none of it any more.
        self._on_committed()

    def restart(self) -> None:
        """Forget what is there."""
        with translated_write_errors(self._part.parent):
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
        self._hash = hashlib.sha256()
        self._num_bytes = 0

    def close(self) -> None:
        """What is there stays for the next one."""
        self._close_file()
        self._lock.release()

    def _take_up(self) -> None:
        """Hash what an earlier fetch has left."""
        if os.fstat(self._fd).st_size > self._piece.num_bytes:
            os.ftruncate(self._fd, 0)
        while data := os.read(self._fd, _READ_BYTES):
            self._hash.update(data)
            self._num_bytes += len(data)

    def _remove(self) -> None:
        self._close_file()
        self._part.unlink(missing_ok=True)
        self._lock.release()

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def try_lock(path: Path) -> BaseFileLock | None:
    """The lock at `path`, None if another process or thread has it. A process that is killed lets go of it."""
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock
