"""Pieces of models on this host's disk, each under its SHA-256: whatever comes from the pool, or goes to it, is here.

`ab/abcd….piece` is whole and was checked; `ab/abcd….part` is coming in, by the process that has it locked.
Several processes use a store at the same time, and any of them may be killed at any moment.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from pathlib import Path

from transport.errors import BadMessage, DeadlineExceeded, NoSpace
from transport.pieces.disk_space import MARGIN_BYTES, free_bytes, mb, no_space, translated_write_errors
from transport.pieces.eviction import evict, evictable, stored_files, whole_pieces
from transport.pieces.leases import Lease, Leases
from transport.pieces.limit import read_limit
from transport.pieces.part_file import open_part
from transport.pieces.partial import PartialPiece
from transport.pieces.piece import Piece

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PUT_WITHIN_S = 10.0
_PUT_AGAIN_S = 0.02


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

    def has_all_of(self, piece: Piece) -> bool:
        """Whether it is here with as many bytes as it has: a disk that lost some is given them again."""
        try:
            return self.path(piece.digest).stat().st_size == piece.num_bytes
        except OSError:
            return False

    def digests(self) -> set[str]:
        """Of all whole pieces. Takes less than to look for some thousands, one by one."""
        return whole_pieces(self.root)

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
        if self.has_all_of(piece):
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
        with translated_write_errors(self.root):
            try:
                part = open_part(path)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                part = open_part(path)
            if part is None:
                return None
            whole = path.with_suffix(".piece")
            if self.has_all_of(piece):
                part.remove()
                return None
        return PartialPiece(piece, part, whole)

    def put(self, data: bytes, digest: str) -> None:
        """Keep the small piece `data` (a model's list), if it is not here.

        Raises WrongBytes, NoSpace, DeadlineExceeded.
        """
        give_up_at_s = time.monotonic() + _PUT_WITHIN_S
        piece = Piece(digest, len(data))
        while not self.has_all_of(piece):
            partial = self.open_partial(piece)
            if partial is None:
                if time.monotonic() >= give_up_at_s:
                    raise DeadlineExceeded(f"another process has been writing piece {digest[:12]} for too long")
                time.sleep(_PUT_AGAIN_S)
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
        with translated_write_errors(self.root):
            return self._leases.take(pieces, self.path)

    def require_space(self, num_bytes: int) -> None:
        """Make room for `num_bytes` more, if need be by evicting pieces that were not used for longest and that nobody
        has leased. Raises NoSpace, with nothing evicted, where that is not enough: call it before a transfer.

        What leases of all processes still lack counts too, so that two of them do not fill the disk together.
        """
        with translated_write_errors(self.root), self._leases.exclusively():
            leased = self._leases.all()
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
                raise self._too_little(num_bytes, used, limit)
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
        with translated_write_errors(self.root), self._leases.exclusively():
            files = stored_files(self.root)
            over = sum(file.num_bytes for file in files) - most_bytes
            return evict(evictable(files, self._leases.all()), over)

    def _too_little(self, num_bytes: int, used: int, limit: int | None) -> NoSpace:
        if limit is not None and num_bytes + MARGIN_BYTES <= free_bytes(self.root):
            return NoSpace(
                f"{mb(num_bytes)} of pieces are to come, but the cache in {self.root} may take {mb(limit)}, of which "
                f"{mb(used)} are in use",
                hint=f"allow it more: potluck cache --limit {-(-(used + num_bytes) // 10**9)}GB",
            )
        return no_space(self.root, f"{mb(num_bytes + MARGIN_BYTES)} are needed for pieces of a model")

    def _named(self, digest: str, kind: str) -> Path:
        if not is_digest(digest):
            raise BadMessage(f"{digest!r} is not the name of a piece")
        return self.root / digest[:2] / f"{digest}.{kind}"


def is_digest(text: str) -> bool:
    """Whether it is a SHA-256 as 64 lower-case hexadecimal digits: only such a text becomes a path."""
    return _DIGEST.fullmatch(text) is not None
