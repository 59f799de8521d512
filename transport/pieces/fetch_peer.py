"""One peer of a fetch: its connection, which comes and goes, what is outstanding there, and what it has answered."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import zmq

from transport.errors import BadMessage, WrongBytes
from transport.messages.pieces import HaveList, HaveRequest, Piece, PieceMissing, PiecePart, PieceRefused, PieceRequest
from transport.messages.pool import PiecePeer
from transport.pieces.client import PieceConnection, ReceivedReply
from transport.pieces.fetch_plan import FetchPlan
from transport.pieces.flow_control import RequestWindow
from transport.pieces.store import PartialPiece, PieceStore
from transport.process.polling import PolledExecutor
from transport.security.curve import Curve
from transport.timeouts import PEER_SILENT_S

HAVE_INTERVAL_S = 0.5
"""How often a peer that a hint leads to is asked what it has by now."""

SLOW_AFTER_S = 2.0
SLOW_LEFT_S = 3.0
_MIN_SPEEDUP = 2.0
_MAX_HAVE_INTERVAL_S = 4.0
_MAX_OUTSTANDING = 32
_MIN_RETRY_S = 0.1
_MAX_RETRY_S = 5.0


@dataclass(slots=True)
class _Active:
    """A piece that is coming in: requested up to `requested`, come up to `received`. `is_its_own`: all of it is from
    this peer, by this connection."""

    piece: Piece
    partial: PartialPiece
    requested: int
    received: int
    is_its_own: bool
    had_bytes: int
    began_s: float
    is_over: bool = False

    def left_s(self, now_s: float) -> float:
        """How long it will take still, by how it came so far."""
        came = self.received - self.had_bytes
        return (self.piece.num_bytes - self.received) * (now_s - self.began_s) / came if came else math.inf


@dataclass(frozen=True, slots=True)
class _Outstanding:
    active: _Active
    offset: int
    num_bytes: int


@dataclass(slots=True)
class FetchState:
    """What the peers of a fetch share. `suspect` pieces had wrong bytes of more than one origin: from now on each
    comes from one peer alone, so that it is clear whose they are. `elsewhere` are those another process is getting.
    `count` is told of bytes that came, or that were thrown away.

    `writing` appends to partial pieces, and `syncing` puts whole ones into the store: what is written survives this
    process, so that more of it may wait. `open` are those that are neither closed nor in the store yet."""

    context: zmq.Context[zmq.Socket[bytes]]
    curve: Curve
    store: PieceStore
    writing: PolledExecutor
    syncing: PolledExecutor
    plan: FetchPlan
    model: str
    suspect: set[str]
    elsewhere: list[Piece]
    open: set[PartialPiece]
    count: Callable[[int], None]


class FetchPeer:
    def __init__(self, peer: PiecePeer, shared: FetchState, now_s: float) -> None:
        self.peer = peer
        self.connection: PieceConnection | None = None
        self.num_bytes = 0
        self.reason = "it was not reached"
        self.is_refused = False
        self._shared = shared
        self._window = RequestWindow()
        self._tokens = itertools.count(1)
        self._outstanding: dict[int, _Outstanding] = {}
        self._outstanding_bytes = 0
        self._active: dict[str, _Active] = {}
        self._requesting: _Active | None = None
        self._retry_s = _MIN_RETRY_S
        self._next_try_s = now_s
        self._last_reply_s = now_s
        self._idle_since_s = now_s
        self._has_have_list = False
        self._is_have_requested = False
        self._have_due_s = now_s
        self._have_interval_s = HAVE_INTERVAL_S

    @property
    def is_usable(self) -> bool:
        """Connected, and it has said what it holds."""
        return self._has_have_list

    @property
    def is_idle(self) -> bool:
        return not self._outstanding

    def extend_deadline(self, suspended_s: float) -> None:
        """This process itself did not run for so long."""
        self._last_reply_s += suspended_s

    def drive(self, now_s: float, usable: Collection[str]) -> None:
        """Connect, and ask for what there is to ask for."""
        if self.is_refused:
            return
        if self.connection is None:
            if now_s < self._next_try_s:
                return
            self._connect(now_s)
        connection = self.connection
        if connection is None:
            return
        connection.poll_monitor()
        if connection.lost_reason:
            self.receive(now_s)  # What it sent before.
            if self.connection is connection:
                self.disconnect(connection.lost_reason, now_s)
            return
        if self._is_silent(connection.is_open, now_s) or not connection.is_open:
            return
        self._request_have_list(connection, now_s)
        if self._has_have_list:
            self._fill(connection, now_s, usable)

    def _is_silent(self, is_open: bool, now_s: float) -> bool:
        """For too long while something was due: then it is disconnected."""
        if now_s - self._last_reply_s <= PEER_SILENT_S:
            return False
        if not is_open:
            self.disconnect(f"nobody answers at {self.peer.endpoint}", now_s)
            return True
        if not self._outstanding and self._has_have_list:
            return False
        self._window.note_silence()
        self.disconnect(f"it was silent for {PEER_SILENT_S:.0f} s", now_s)
        return True

    def receive(self, now_s: float) -> None:
        """Take what has come. A peer that breaks the rules is refused."""
        connection = self.connection
        if connection is not None:
            try:
                for received in connection.replies():
                    self._last_reply_s = now_s
                    self._take(received, now_s)
                    if self.connection is not connection:
                        break
            except BadMessage as error:
                self.refuse(error.message, now_s)

    def slow_pieces(self, now_s: float) -> list[str]:
        """The digests of those that have been coming in for a while, and will take much longer."""
        return [
            digest
            for digest, active in self._active.items()
            if now_s - active.began_s >= SLOW_AFTER_S and active.left_s(now_s) >= SLOW_LEFT_S
        ]

    def is_faster(self, other: FetchPeer, digest: str, now_s: float) -> bool:
        """Whether the piece that `other` has begun would come clearly faster from here, as far as is known."""
        active, bytes_per_s = other._active[digest], self._window.bytes_per_s
        left_bytes = active.piece.num_bytes - active.received
        return not bytes_per_s or _MIN_SPEEDUP * left_bytes / bytes_per_s < active.left_s(now_s)

    def release_piece(self, digest: str) -> None:
        """Somebody else gets on with this piece. What was asked of it comes, and is thrown away."""
        self._shared.plan.mark_slow(self.peer.key, digest)
        self._drop(self._active[digest])

    def disconnect(self, reason: str, now_s: float) -> None:
        """Give back what is outstanding, and try again later."""
        self.reason = reason
        self.close()
        self._next_try_s = now_s + self._retry_s
        self._retry_s = min(2 * self._retry_s, _MAX_RETRY_S)

    def refuse(self, reason: str, now_s: float) -> None:
        """For good."""
        self.disconnect(reason, now_s)
        self.is_refused = True
        self._shared.plan.note_refused(self.peer.key)

    def close(self) -> None:
        """Partial pieces stay."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        self._has_have_list = self._is_have_requested = False
        for active in list(self._active.values()):
            self._drop(active)
        self._outstanding.clear()
        self._outstanding_bytes = 0
        self._requesting = None

    def _connect(self, now_s: float) -> None:
        try:
            self.connection = PieceConnection(self._shared.context, self.peer, self._shared.curve)
        except BadMessage as error:
            self.refuse(error.message, now_s)
        self._last_reply_s = self._idle_since_s = self._have_due_s = now_s

    def _request_have_list(self, connection: PieceConnection, now_s: float) -> None:
        plan = self._shared.plan
        if now_s < self._have_due_s:
            return
        self._have_due_s = now_s + self._have_interval_s
        if (not self._has_have_list or plan.wants_have_list(self.peer.key)) and connection.send(
            HaveRequest(next(self._tokens), self._shared.model)
        ):
            if not self._outstanding and not self._is_have_requested:
                self._last_reply_s = now_s
            self._is_have_requested = True
        elif not self._has_have_list:
            self._have_due_s = now_s  # Not sent: it takes nothing yet.

    def _fill(self, connection: PieceConnection, now_s: float, usable: Collection[str]) -> None:
        while self._outstanding_bytes < self._window.num_bytes and len(self._outstanding) < _MAX_OUTSTANDING:
            if self._shared.writing.is_full or self._shared.syncing.is_full:
                return
            active = self._requesting or self._begin(now_s, usable)
            if active is None:
                return
            count = min(self._window.part_bytes, active.piece.num_bytes - active.requested)
            token = next(self._tokens)
            if not connection.send(PieceRequest(token, active.piece.digest, active.requested, count)):
                return
            if not self._outstanding:
                self._last_reply_s = now_s
            self._outstanding[token] = _Outstanding(active, active.requested, count)
            self._outstanding_bytes += count
            active.requested += count
            self._requesting = active if active.requested < active.piece.num_bytes else None
        self._window.note_full()

    def _begin(self, now_s: float, usable: Collection[str]) -> _Active | None:
        """The next piece of which something is missing."""
        shared = self._shared
        while True:
            idle_s = 0.0 if self._outstanding else now_s - self._idle_since_s
            piece = shared.plan.take(self.peer.key, now_s, usable=usable, idle_s=idle_s)
            if piece is None:
                return None
            partial = shared.store.open_partial(piece)
            if partial is None:
                shared.elsewhere.append(piece)
                continue
            shared.open.add(partial)
            if piece.digest in shared.suspect and partial.num_bytes:
                shared.count(-partial.num_bytes)
                partial.restart()
            had_bytes = partial.num_bytes
            active = _Active(
                piece,
                partial,
                requested=had_bytes,
                received=had_bytes,
                is_its_own=not had_bytes,
                had_bytes=had_bytes,
                began_s=now_s,
            )
            self._active[piece.digest] = active
            if had_bytes < piece.num_bytes:
                self._requesting = active
                return active
            self._end(active)
            self._commit(active)

    def _take(self, received: ReceivedReply, now_s: float) -> None:
        match received.reply:
            case HaveList(bitmap=bitmap):
                self._has_have_list = True
                self._is_have_requested = False
                has_changed = self._shared.plan.update_have_list(self.peer.key, bitmap, now_s)
                again_s = (
                    HAVE_INTERVAL_S
                    if has_changed or self._shared.plan.is_hinted(self.peer.key)
                    else _MAX_HAVE_INTERVAL_S
                )
                self._have_interval_s = min(2 * self._have_interval_s, again_s)
            case PieceRefused(reason=reason):
                self.disconnect(f"it refused: {reason!r}", now_s)
            case PieceMissing(token=token):
                outstanding = self._take_outstanding(token, now_s)
                self._shared.plan.note_missing(self.peer.key, outstanding.active.piece.digest)
                self._drop(outstanding.active)
            case PiecePart(token=token, digest=digest, offset=offset):
                outstanding = self._take_outstanding(token, now_s)
                if digest != outstanding.active.piece.digest or offset != outstanding.offset:
                    raise BadMessage("it sent another part than was asked for")
                if len(received.buffer) != outstanding.num_bytes:
                    raise BadMessage(
                        f"it sent {len(received.buffer)} bytes where {outstanding.num_bytes} were asked for"
                    )
                self._write(outstanding.active, received.buffer, now_s)

    def _take_outstanding(self, token: int, now_s: float) -> _Outstanding:
        outstanding = self._outstanding.pop(token, None)
        if outstanding is None:
            raise BadMessage("it sent what was not asked for")
        self._outstanding_bytes -= outstanding.num_bytes
        if not self._outstanding:
            self._idle_since_s = now_s
            self._window.note_idle()
        return outstanding

    def _write(self, active: _Active, buffer: memoryview, now_s: float) -> None:
        self._window.note_received(len(buffer), now_s)
        if active.is_over:
            return
        shared, num_bytes = self._shared, len(buffer)
        active.received += num_bytes
        is_last = active.received == active.piece.num_bytes
        if is_last:
            self._end(active)

        def written(error: BaseException | None) -> None:
            if error is not None:
                raise error
            shared.count(num_bytes)
            if is_last:
                self._commit(active)

        shared.writing.submit(lambda: active.partial.write(buffer), written, num_bytes)
        self.num_bytes += num_bytes
        self._retry_s = _MIN_RETRY_S
        shared.plan.note_useful(self.peer.key, num_bytes, now_s)

    def _end(self, active: _Active) -> None:
        """Nothing more is requested, or written."""
        active.is_over = True
        del self._active[active.piece.digest]

    def _commit(self, active: _Active) -> None:
        """All of it is written."""
        shared, digest = self._shared, active.piece.digest

        def committed(error: BaseException | None) -> None:
            shared.open.discard(active.partial)
            if error is None:
                shared.plan.note_done(digest)
            elif not isinstance(error, WrongBytes):
                raise error
            else:
                shared.count(-active.piece.num_bytes)
                shared.plan.give_back(digest)
                if active.is_its_own:
                    self.refuse(f"it sent wrong bytes for piece {digest[:12]}", time.monotonic())
                else:
                    shared.suspect.add(digest)

        shared.syncing.submit(active.partial.commit, committed, active.piece.num_bytes)

    def _drop(self, active: _Active) -> None:
        """Not from this peer, or not now. Pending again as soon as it is closed: another peer may open it then."""
        if self._requesting is active:
            self._requesting = None
        if active.is_over:
            return
        self._end(active)

        def closed(error: BaseException | None) -> None:
            self._shared.open.discard(active.partial)
            if error is not None:
                raise error
            self._shared.plan.give_back(active.piece.digest)

        self._shared.writing.submit(active.partial.close, closed)
