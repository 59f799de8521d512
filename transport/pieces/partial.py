"""A piece that is coming in: a `.part` file that any later fetch, of any process, goes on with."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from transport.errors import WrongBytes
from transport.pieces.disk_space import translated_write_errors
from transport.pieces.part_file import PartFile
from transport.pieces.piece import Piece

_READ_BYTES = 1 << 20


class PartialPiece:
    """The first `num_bytes` bytes of a piece, on the disk. One process at a time has it. Owned by one thread."""

    def __init__(self, piece: Piece, part: PartFile, whole: Path) -> None:
        """`part` is let go of with `close`, `commit` or an error."""
        self._piece = piece
        self._part = part
        self._whole = whole
        self._hash = hashlib.sha256()
        self._num_bytes = 0
        try:
            with translated_write_errors(whole.parent):
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
        with translated_write_errors(self._whole.parent):
            while rest:
                count = os.write(self._part.fd, rest)
                self._hash.update(rest[:count])
                self._num_bytes += count
                rest = rest[count:]

    def commit(self) -> None:
        """It is whole: into the store with it, for good. Raises WrongBytes, with what was there removed."""
        found = self._hash.hexdigest()
        if self._num_bytes != self._piece.num_bytes or found != self._piece.digest:
            self._part.remove()
            raise WrongBytes(
                f"what came for piece {self._piece.digest[:12]} of {self._piece.num_bytes:,} bytes are "
                f"{self._num_bytes:,} bytes with the SHA-256 {found[:12]}"
            )
        with translated_write_errors(self._whole.parent):
            # Nobody checks it again: after a power cut its name must not stand for bytes that were never written.
            os.fsync(self._part.fd)
            self._part.move(self._whole)

    def restart(self) -> None:
        """Forget what is there."""
        with translated_write_errors(self._whole.parent):
            os.ftruncate(self._part.fd, 0)
            os.lseek(self._part.fd, 0, os.SEEK_SET)
        self._hash = hashlib.sha256()
        self._num_bytes = 0

    def close(self) -> None:
        """What is there stays for the next one."""
        self._part.release()

    def _take_up(self) -> None:
        """Hash what an earlier fetch has left."""
        if os.fstat(self._part.fd).st_size > self._piece.num_bytes:
            os.ftruncate(self._part.fd, 0)
        while data := os.read(self._part.fd, _READ_BYTES):
            self._hash.update(data)
            self._num_bytes += len(data)
