"""Which piece to ask of whom next. Pure: time is passed in.

A piece that a hint gives to another host is waited for there: that host gets it from the head at the same time. The
head comes last for what others have too, and helps where they are slow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from transport.messages.pieces import Piece, changed_bits, has_piece
from transport.messages.pool import PieceHint
from transport.pieces.flow_control import TransferRate
from transport.timeouts import AWAY_PATIENCE_S, HINT_PATIENCE_S

ENDGAME_IDLE_S = 2.0
"""The head, idle for so long, takes its part of what others give slowly, from the end."""

ENDGAME_LATE_S = 4.0
"""Others are slow if they will take longer than that for what they have still to give."""


_QUEUE_S = 0.2


@dataclass(slots=True)
class _PeerPieces:
    """`has` are the wanted pieces that its bitmap tells of. `slow_for`: pieces that it had begun, and that a faster one
    is to go on with."""

    bitmap: bytes = b""
    has: set[str] = field(default_factory=set)
    lacks: set[str] = field(default_factory=set)
    slow_for: set[str] = field(default_factory=set)
    useful_at_s: float = 0.0
    is_refused: bool = False


@dataclass(frozen=True, slots=True)
class _WantedPiece:
    piece: Piece
    indexes: tuple[int, ...]
    hinted: str


@dataclass(frozen=True, slots=True)
class _Queue:
    digests: deque[str]
    version: int
    made_at_s: float


class FetchPlan:
    """Keys are those of peers. `pieces` are by their number in the model's list; one that is there twice is wanted
    once. A piece is pending, taken or done."""

    def __init__(
        self, pieces: Mapping[int, Piece], keys: Sequence[str], hints: Sequence[PieceHint], now_s: float
    ) -> None:
        """`keys`: the head's is the last."""
        self._head = keys[-1] if keys else ""
        self._peers = {key: _PeerPieces(useful_at_s=now_s) for key in keys}
        self._wanted = _wanted(pieces, {hint for hint in hints if hint.peer in self._peers})
        self._hinted = {wanted.hinted for wanted in self._wanted.values()}
        self._by_index = {index: wanted for wanted in self._wanted.values() for index in wanted.indexes}
        self._pending = dict.fromkeys(self._wanted)
        self._num_done = 0
        self._version = 0
        self._queues: dict[str, _Queue] = {}
        self._of_others = TransferRate(now_s)
        self._is_endgame = False

    @property
    def is_done(self) -> bool:
        return self._num_done == len(self._wanted)

    def take(self, key: str, now_s: float, *, usable: Collection[str], idle_s: float) -> Piece | None:
        """The next piece to ask `key` for, which has had nothing to do for `idle_s`. `usable` peers are connected."""
        queue = self._queues.get(key)
        if queue is None or self._is_stale(queue, now_s):
            queue = self._queues[key] = self._queue(key, now_s, usable, idle_s)
        while queue.digests:
            digest = queue.digests.popleft()
            if digest in self._pending and digest not in self._peers[key].lacks:
                del self._pending[digest]
                return self._wanted[digest].piece
        return None

    def give_back(self, digest: str) -> None:
        """A taken piece is pending again, before all others."""
        self._pending = {digest: None, **self._pending}
        self._version += 1

    def note_done(self, digest: str) -> None:
        self._num_done += 1

    def is_hinted(self, key: str) -> bool:
        """Whether a hint leads to it."""
        return key in self._hinted

    def note_useful(self, key: str, num_bytes: int, now_s: float) -> None:
        """It gave something."""
        self._peers[key].useful_at_s = now_s
        if key != self._head:
            self._of_others.note(num_bytes, now_s)

    def mark_slow(self, key: str, digest: str) -> None:
        """A piece that it has begun is given back because somebody else is faster."""
        self._peers[key].slow_for.add(digest)

    def can_reassign(self, key: str, digest: str) -> bool:
        """Whether the piece, which a slow peer has begun, can be had of this one."""
        return self._has(key, self._wanted[digest]) and digest not in self._peers[key].slow_for

    def update_have_list(self, key: str, bitmap: bytes, now_s: float) -> bool:
        """It says which pieces of the model it has. Whether those are others than before."""
        peer = self._peers[key]
        if bitmap == peer.bitmap:
            return False
        for index in changed_bits(peer.bitmap, bitmap):
            wanted = self._by_index.get(index)
            if wanted is not None and any(has_piece(bitmap, each) for each in wanted.indexes):
                peer.has.add(wanted.piece.digest)
            elif wanted is not None:
                peer.has.discard(wanted.piece.digest)
        peer.bitmap, peer.useful_at_s = bitmap, now_s
        peer.lacks.clear()
        self._version += 1
        return True

    def note_missing(self, key: str, digest: str) -> None:
        self._peers[key].lacks.add(digest)
        self._version += 1

    def note_refused(self, key: str) -> None:
        self._peers[key].is_refused = True
        self._version += 1

    def wants_have_list(self, key: str) -> bool:
        """Whether there are pending pieces that it is not known to have."""
        return any(not self._has(key, self._wanted[digest]) for digest in self._pending)

    def lacks(self, key: str) -> bool:
        """Whether it has nothing of what is pending, as far as is known."""
        return not any(self._may_have(key, self._wanted[digest]) for digest in self._pending)

    def unavailable_piece(self, usable: Collection[str]) -> Piece | None:
        """A pending piece that every peer is known to lack, if all that are not refused are usable."""
        asked = [key for key, peer in self._peers.items() if not peer.is_refused]
        if not set(asked) <= set(usable):
            return None
        for digest in self._pending:
            if not any(self._may_have(key, self._wanted[digest]) for key in asked):
                return self._wanted[digest].piece
        return None

    def _is_stale(self, queue: _Queue, now_s: float) -> bool:
        """To make one costs as much as there are pieces: not more often than things change, nor all the time."""
        age_s = now_s - queue.made_at_s
        if queue.digests:
            return queue.version != self._version and age_s >= _QUEUE_S
        return queue.version != self._version or age_s >= _QUEUE_S

    def _queue(self, key: str, now_s: float, usable: Collection[str], idle_s: float) -> _Queue:
        """What to ask `key` for as things are now, in order."""
        peer, found, left = self._peers[key], deque[str](), list[str]()
        if peer.is_refused or (key != self._head and not (peer.has and self._pending)):
            return _Queue(found, self._version, now_s)
        for digest in self._pending:
            wanted = self._wanted[digest]
            if digest in peer.lacks or (digest in peer.slow_for and self._is_at_others(key, wanted, usable)):
                continue
            if key != self._head:
                if digest in peer.has:
                    found.append(digest)
            elif not self._has(key, wanted) and self._is_at_others(key, wanted, usable):
                continue  # Perhaps it has it all the same: asked for only if nobody says so.
            elif not self._is_left_to_others(wanted, now_s, usable):
                found.append(digest)
            else:
                left.append(digest)
        if key == self._head:
            self._endgame(found, left, now_s, idle_s)
        return _Queue(found, self._version, now_s)

    def _endgame(self, found: deque[str], left: Sequence[str], now_s: float, idle_s: float) -> None:
        """The head does its part of what is `left` to others, one piece after the other. It begins when it has been
        idle; what it gives that way does not count as work of its own."""
        self._is_endgame = not found and (self._is_endgame or idle_s >= ENDGAME_IDLE_S)
        late_bytes = sum(self._wanted[digest].piece.num_bytes for digest in left)
        if self._is_endgame and late_bytes > ENDGAME_LATE_S * self._of_others.bytes_per_s(now_s):
            found.append(left[-1])

    def _is_left_to_others(self, wanted: _WantedPiece, now_s: float, usable: Collection[str]) -> bool:
        """By the head."""
        hinted = self._peers.get(wanted.hinted)
        if hinted is not None and wanted.hinted != self._head and not hinted.is_refused:
            is_missing = wanted.piece.digest in hinted.lacks or wanted.piece.digest in hinted.slow_for
            patience_s = HINT_PATIENCE_S if wanted.hinted in usable else AWAY_PATIENCE_S
            if not is_missing and now_s - hinted.useful_at_s < patience_s:
                return True
        return self._is_at_others(self._head, wanted, usable)

    def _is_at_others(self, key: str, wanted: _WantedPiece, usable: Collection[str]) -> bool:
        """Whether others have it, and are not slow."""
        digest = wanted.piece.digest
        return any(
            other != key and self._has(other, wanted) and digest not in self._peers[other].slow_for for other in usable
        )

    def _may_have(self, key: str, wanted: _WantedPiece) -> bool:
        """The head is asked even for what it does not claim to have."""
        if key == self._head:
            return wanted.piece.digest not in self._peers[key].lacks
        return self._has(key, wanted)

    def _has(self, key: str, wanted: _WantedPiece) -> bool:
        peer, digest = self._peers[key], wanted.piece.digest
        return digest in peer.has and digest not in peer.lacks and not peer.is_refused


def _wanted(pieces: Mapping[int, Piece], hints: Collection[PieceHint]) -> dict[str, _WantedPiece]:
    most = max(pieces, default=-1) + 1
    hinted = {index: hint.peer for hint in hints for index in range(max(0, hint.first), min(hint.last, most))}
    found: dict[str, _WantedPiece] = {}
    for index in sorted(pieces):
        piece = pieces[index]
        known = found.get(piece.digest)
        indexes = (index,) if known is None else (*known.indexes, index)
        to_whom = hinted.get(index, "") if known is None else known.hinted or hinted.get(index, "")
        found[piece.digest] = _WantedPiece(piece, indexes, to_whom)
    return found
