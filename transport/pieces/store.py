"""The store keeps pieces of models on this host's disk, whole ones and partial ones, under their SHA-256.

`ab/abcd….piece` is whole and was checked; `ab/abcd….part` is coming in, by the process that has it locked.
Several processes use a store at the same time, and any of them may be killed at any moment.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Collection
from pathlib import Path

from transport.errors import BadMessage, DeadlineExceeded, NoSpace, WrongBytes
from transport.messages.pieces import Piece
from transport.pieces.disk_space import (
    MARGIN_BYTES,
    evict,
    evictable,
    format_mb,
    free_bytes,
    no_space_error,
    read_limit,
    stored_files,
    translate_write_errors,
    whole_digests,
)
from transport.pieces.locks import Lease, Leases, PartFile, open_part
from transport.timeouts import FILE_LOCK_S

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
            with translate_write_errors(whole.parent):
                self._hash_existing()
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
        with translate_write_errors(self._whole.parent):
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
        with translate_write_errors(self._whole.parent):
            # Nobody checks it again: after a power cut its name must not stand for bytes that were never written.
            os.fsync(self._part.fd)
            self._part.move(self._whole)

    def restart(self) -> None:
        """Forget what is there."""
        with translate_write_errors(self._whole.parent):
            os.ftruncate(self._part.fd, 0)
            os.lseek(self._part.fd, 0, os.SEEK_SET)
        self._hash = hashlib.sha256()
        self._num_bytes = 0

    def close(self) -> None:
        """What is there stays for the next one."""
        self._part.release()

    def _hash_existing(self) -> None:
        """Hash what an earlier fetch has left."""
        if os.fstat(self._part.fd).st_size > self._piece.num_bytes:
            os.ftruncate(self._part.fd, 0)
        while data := os.read(self._part.fd, _READ_BYTES):
            self._hash.update(data)
            self._num_bytes += len(data)


_DIGEST = re.compile(r"[0-9a-f]{64}")
_PUT_RETRY_S = 0.02


class PieceStore:
    """The store in the folder `root`, which is made when something is written. Safe for several threads.

    It holds at most `limit_bytes`, as soon as something comes in; None: what the store's own setting says, or all that
    the disk has room for.
    """

    def __init__(self, root: Path, *, limit_bytes: int | None = None) -> None:
        self.root = root
        self._limit_bytes = limit_bytes
        self._leases = Leases(root)

    @property
    def limit_bytes(self) -> int | None:
        return read_limit(self.root) if self._limit_bytes is None else self._limit_bytes

    def has(self, digest: str) -> bool:
        """Whether the piece is here, whole. False for what is no digest."""
        return is_digest(digest) and self.path(digest).exists()

    def has_whole(self, piece: Piece) -> bool:
        """Whether it is here with as many bytes as it has: a disk that lost some is given them again."""
        try:
            return self.path(piece.digest).stat().st_size == piece.num_bytes
        except OSError:
            return False

    def digests(self) -> set[str]:
        """Of all whole pieces. Takes less than to look for some thousands, one by one."""
        return whole_digests(self.root)

    def path(self, digest: str) -> Path:
        """Where the piece lies, or would. Raises BadMessage for what is no digest."""
        return self._named(digest, "piece")

    def read(self, digest: str) -> bytes | None:
        """A small piece (a model's list); None if it is not here, or not any more."""
        try:
            return self.path(digest).read_bytes()
        except FileNotFoundError:
            return None

    def partial_bytes(self, piece: Piece) -> int:
        """How many of the piece's bytes are here: all of them, or those that an earlier fetch has left."""
        if self.has_whole(piece):
            return piece.num_bytes
        try:
            return min(self._named(piece.digest, "part").stat().st_size, piece.num_bytes)
        except FileNotFoundError:
            return 0

    def open_partial(self, piece: Piece) -> PartialPiece | None:
        """The piece, to be written on from where it is. None if somebody else is getting it now, or has just got it.

        Raises NoSpace, PotluckError.
        """
        path = self._named(piece.digest, "part")
        with translate_write_errors(self.root):
            try:
                part = open_part(path)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                part = open_part(path)
            if part is None:
                return None
            whole = path.with_suffix(".piece")
            if self.has_whole(piece):
                part.remove()
                return None
        return PartialPiece(piece, part, whole)

    def put(self, data: bytes, digest: str) -> None:
        """Keep the small piece `data` (a model's list), if it is not here.

        Raises WrongBytes, NoSpace, DeadlineExceeded.
        """
        give_up_at_s = time.monotonic() + FILE_LOCK_S
        piece = Piece(digest, len(data))
        while not self.has_whole(piece):
            partial = self.open_partial(piece)
            if partial is None:
                if time.monotonic() >= give_up_at_s:
                    raise DeadlineExceeded(f"another process has been writing piece {digest[:12]} for too long")
                time.sleep(_PUT_RETRY_S)
                continue
            try:
                partial.restart()
                partial.write(data)
                partial.commit()
            finally:
                partial.close()

    def lease(self, pieces: Collection[Piece]) -> Lease:
        """While it is open and this process lives, none of these pieces is evicted, be they here or yet to come.

        Take it before looking what is missing.
        """
        with translate_write_errors(self.root):
            return self._leases.take(pieces, self.path)

    def require_space(self, num_bytes: int) -> None:
        """Make room for `num_bytes` more, if need be by evicting pieces that were not used for longest and that nobody
        has leased. Raises NoSpace, with nothing evicted, where that is not enough: call it before a transfer.

        What leases of all processes still lack counts too, so that two of them do not fill the disk together.
        """
        with translate_write_errors(self.root), self._leases.exclusively():
            leased = self._leases.leased_pieces()
            num_bytes = max(num_bytes, sum(piece.num_bytes - self.partial_bytes(piece) for piece in leased.values()))
            files = stored_files(self.root)
            used, limit = sum(file.num_bytes for file in files), self.limit_bytes
            over = max(
                num_bytes + MARGIN_BYTES - free_bytes(self.root), 0 if limit is None else used + num_bytes - limit
            )
            if over <= 0:
                return
            found = evictable(files, leased)
            if sum(file.num_bytes for file in found) < over:
                raise self._not_enough_space(num_bytes, used, limit)
            evict(found, over)

    def used_bytes(self) -> int:
        """What whole and partial pieces take."""
        return sum(file.num_bytes for file in stored_files(self.root))

    def trim(self) -> int:
        """Evict what is beyond the limit, as far as nobody has leased it; the bytes freed."""
        limit = self.limit_bytes
        return 0 if limit is None else self._evict_down_to(limit)

    def clear(self) -> int:
        """Evict everything that nobody has leased; the bytes freed."""
        return self._evict_down_to(0)

    def _evict_down_to(self, most_bytes: int) -> int:
        if not self.root.is_dir():
            return 0
        with translate_write_errors(self.root), self._leases.exclusively():
            files = stored_files(self.root)
            over = sum(file.num_bytes for file in files) - most_bytes
            return evict(evictable(files, self._leases.leased_pieces()), over)

    def _not_enough_space(self, num_bytes: int, used: int, limit: int | None) -> NoSpace:
        if limit is not None and num_bytes + MARGIN_BYTES <= free_bytes(self.root):
            return NoSpace(
                f"{format_mb(num_bytes)} of pieces are to come, but the cache in {self.root} may take "
                f"{format_mb(limit)}, of which "
                f"{format_mb(used)} are in use",
                hint=f"allow it more: potluck cache --limit {-(-(used + num_bytes) // 10**9)}GB",
            )
        return no_space_error(self.root, f"{format_mb(num_bytes + MARGIN_BYTES)} are needed for pieces of a model")

    def _named(self, digest: str, kind: str) -> Path:
        if not is_digest(digest):
            raise BadMessage(f"{digest!r} is not the name of a piece")
        return self.root / digest[:2] / f"{digest}.{kind}"


def is_digest(text: str) -> bool:
    """Whether it is a SHA-256 as 64 lower-case hexadecimal digits: only such a text becomes a path."""
    return _DIGEST.fullmatch(text) is not None
