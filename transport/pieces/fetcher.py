"""Gets the pieces that a host lacks from the hosts that have them: each checked by its hash, from where it stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import zmq

from transport.errors import DownloadFailed
from transport.messages.pieces import MAX_PIECE_BYTES, Piece
from transport.messages.pool import SharedModel
from transport.pieces.fetch_peer import FetchPeer, FetchState
from transport.pieces.fetch_plan import FetchPlan
from transport.pieces.store import PieceStore
from transport.process.polling import PolledExecutor, SuspendDetector
from transport.security.curve import Curve
from transport.timeouts import FETCH_PATIENCE_S, FETCH_UNAVAILABLE_S

log = logging.getLogger("potluck.pieces")

_UNAVAILABLE_INTERVAL_S = 0.2
_TICK_S = 0.05
MAX_UNWRITTEN_BYTES = 4 * 2**20
"""What waits to be written is lost with the process."""

_MAX_UNWRITTEN_PARTS = 64
_SYNC_THREADS = 16
"""Journals of file systems write down all at once that are synced at the same time: many small pieces."""
_MAX_UNSYNCED_BYTES = 3 * MAX_PIECE_BYTES
_MAX_UNSYNCED_PIECES = 64
_ELSEWHERE_INTERVAL_S = 0.5
_REASSIGN_INTERVAL_S = 0.5
_HINT = "is the head running, and reachable from here? potluck doctor says; what came so far is kept"

ReportProgress = Callable[[int, int], None]
"""Bytes that are there of those that were missing, what an earlier fetch had left included; and how many were missing.
Called from the thread that fetches, at most every 50 ms or so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchReport:
    """`bytes_by_peer` is by name, and so is `refused_peers`, with the reasons. Not `is_complete`: it was stopped."""

    is_complete: bool
    seconds: float
    bytes_by_peer: dict[str, int] = field(default_factory=dict)
    refused_peers: dict[str, str] = field(default_factory=dict)


def fetch(
    pieces: Mapping[int, Piece],
    store: PieceStore,
    shared: SharedModel,
    *,
    curve: Curve,
    context: zmq.Context[zmq.Socket[bytes]],
    progress: ReportProgress = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
    patience_s: float = FETCH_PATIENCE_S,
) -> FetchReport:
    """Puts into the store what it lacks of `pieces`, which are by their number in the list of the `shared` model. The
    head is the last of its peers. Who will read the pieces has a lease of them.

    Raises NoSpace before the first byte is asked for, or when the disk fills up all the same; DownloadFailed when a
    piece is nowhere to be had, or nothing has come for `patience_s`. What came is kept, also when `stop` says so.
    """
    began_s = time.monotonic()
    missing = {index: piece for index, piece in pieces.items() if not store.has_whole(piece)}
    if not missing:
        return FetchReport(is_complete=True, seconds=time.monotonic() - began_s)
    peers = [peer for peer in shared.peers if peer.key != curve.keys.public]  # What this host gives, it has.
    if not peers:
        raise DownloadFailed(f"{shared.name} is not on this host, and no other host offers it", hint=_HINT)
    once = {piece.digest: piece for piece in missing.values()}.values()
    left_bytes = {piece.digest: store.partial_bytes(piece) for piece in once}
    store.require_space(sum(piece.num_bytes - left_bytes[piece.digest] for piece in once))
    plan = FetchPlan(missing, [peer.key for peer in peers], shared.hints, began_s)
    done = _FetchProgress(sum(left_bytes.values()), sum(piece.num_bytes for piece in once), progress, began_s)
    writing = PolledExecutor(threads=1, max_bytes=MAX_UNWRITTEN_BYTES, max_jobs=_MAX_UNWRITTEN_PARTS)
    syncing = PolledExecutor(threads=_SYNC_THREADS, max_bytes=_MAX_UNSYNCED_BYTES, max_jobs=_MAX_UNSYNCED_PIECES)
    state = FetchState(context, curve, store, writing, syncing, plan, shared.digest, set(), [], set(), done.add)
    running = _Fetch(state, [FetchPeer(peer, state, began_s) for peer in peers], done, shared.name, patience_s)
    try:
        is_complete = running.run(stop)
    finally:
        running.close()
    return FetchReport(
        is_complete=is_complete,
        seconds=time.monotonic() - began_s,
        bytes_by_peer={each.peer.name: each.num_bytes for each in running.peers if each.num_bytes},
        refused_peers={each.peer.name: each.reason for each in running.peers if each.is_refused},
    )


class _FetchProgress:
    """Counts what is there, for whoever watches, and knows when there was last something new."""

    def __init__(self, done_bytes: int, total_bytes: int, progress: ReportProgress, now_s: float) -> None:
        self.last_s = now_s
        self._done_bytes = done_bytes
        self._total_bytes = total_bytes
        self._progress = progress
        self._reported_bytes: int | None = None

    def add(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        if num_bytes > 0:
            self.last_s = time.monotonic()

    def report(self) -> None:
        if self._reported_bytes != self._done_bytes:
            self._reported_bytes = self._done_bytes
            self._progress(self._done_bytes, self._total_bytes)


class _Fetch:
    def __init__(
        self, shared: FetchState, peers: list[FetchPeer], done: _FetchProgress, what: str, patience_s: float
    ) -> None:
        self.peers = peers
        self._shared = shared
        self._done = done
        self._what = what
        self._patience_s = patience_s
        self._unavailable_since_s: float | None = None
        self._unavailable_due_s = 0.0
        self._elsewhere_due_s = 0.0
        self._reassign_due_s = 0.0
        self._elsewhere_bytes = 0
        self._logged: set[str] = set()
        self._report_at_s = 0.0

    def run(self, stop: Callable[[], bool]) -> bool:
        """Whether it is complete. Raises DownloadFailed."""
        suspends = SuspendDetector()
        while not self._shared.plan.is_done:
            now_s = time.monotonic()
            if stop():
                return False
            usable = {peer.peer.key for peer in self.peers if peer.is_usable}
            for peer in self.peers:
                peer.drive(now_s, usable)
            self._check_elsewhere(now_s)
            self._reassign(now_s)
            zmq.zmq_poll(self._poll_items(), int(_TICK_S * 1000))
            suspended_s = suspends.suspended_s(_TICK_S)
            now_s = time.monotonic()
            for peer in self.peers:
                peer.extend_deadline(suspended_s)
                peer.receive(now_s)
            self._shared.writing.run_callbacks()
            self._shared.syncing.run_callbacks()
            self._done.last_s += suspended_s
            self._check(now_s)
            if now_s >= self._report_at_s:
                self._report_at_s = now_s + _TICK_S
                self._done.report()
        self._done.report()
        return True

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
        self._shared.writing.close()
        self._shared.syncing.close(cancel=True)
        for partial in self._shared.open:
            partial.close()

    def _poll_items(self) -> list[tuple[Any, int]]:
        lines = [peer.connection for peer in self.peers if peer.connection is not None]
        sources: list[Any] = [self._shared.writing.fileno(), self._shared.syncing.fileno()]
        sources += [source for line in lines for source in (line.socket, line.monitor)]
        return [(source, zmq.POLLIN) for source in sources]

    def _reassign(self, now_s: float) -> None:
        """Who has nothing to do gets on with what a slow peer has begun."""
        if now_s < self._reassign_due_s or self._shared.writing.is_full or self._shared.syncing.is_full:
            return
        self._reassign_due_s = now_s + _REASSIGN_INTERVAL_S
        for idle in [peer for peer in self.peers if peer.is_usable and peer.is_idle]:
            for slow in self.peers:
                found = (
                    digest
                    for digest in slow.slow_pieces(now_s)
                    if self._shared.plan.can_reassign(idle.peer.key, digest) and idle.is_faster(slow, digest, now_s)
                )
                if slow is not idle and (digest := next(found, None)) is not None:
                    slow.release_piece(digest)
                    break

    def _check_elsewhere(self, now_s: float) -> None:
        """Pieces that another process of this host was getting: it may have them by now, or have ended."""
        shared = self._shared
        if not shared.elsewhere or now_s < self._elsewhere_due_s:
            return
        self._elsewhere_due_s = now_s + _ELSEWHERE_INTERVAL_S
        pieces, shared.elsewhere[:] = list(shared.elsewhere), []
        there = [piece for piece in pieces if shared.store.has_whole(piece)]
        for piece in there:
            shared.plan.note_done(piece.digest)
            shared.count(piece.num_bytes)
        others = [piece for piece in pieces if piece not in there]
        for piece in others:
            shared.plan.give_back(piece.digest)
        came_bytes = sum(shared.store.partial_bytes(piece) for piece in others)
        if came_bytes != self._elsewhere_bytes:
            self._elsewhere_bytes = came_bytes
            self._done.last_s = now_s

    def _check(self, now_s: float) -> None:
        """Say which peers were refused; give up when there is nothing to hope for. Raises DownloadFailed."""
        for peer in self.peers:
            if peer.is_refused and peer.peer.key not in self._logged:
                self._logged.add(peer.peer.key)
                log.warning("nothing more is taken from %s: %s", peer.peer.name, peer.reason)
        shared = self._shared
        is_settled = shared.writing.is_idle and shared.syncing.is_idle
        if all(peer.is_refused for peer in self.peers) and is_settled and not shared.plan.is_done:
            raise self._failed("no host is left to get it from")
        if now_s - self._done.last_s > self._patience_s:
            raise self._failed(f"nothing came for {self._patience_s:.0f} s")
        if now_s < self._unavailable_due_s:
            return
        self._unavailable_due_s = now_s + _UNAVAILABLE_INTERVAL_S
        unavailable: Piece | None = None
        if all(peer.is_idle for peer in self.peers):
            unavailable = self._shared.plan.unavailable_piece({peer.peer.key for peer in self.peers if peer.is_usable})
        if unavailable is None:
            self._unavailable_since_s = None
        elif self._unavailable_since_s is None:
            self._unavailable_since_s = now_s
        elif now_s - self._unavailable_since_s > min(FETCH_UNAVAILABLE_S, self._patience_s / 2):
            raise self._failed(f"no host has piece {unavailable.digest[:12]}")

    def _failed(self, why: str) -> DownloadFailed:
        tried = "; ".join(f"{peer.peer.name}: {_state(peer, self._shared.plan)}" for peer in self.peers)
        return DownloadFailed(f"{self._what} can't be got from the pool: {why} ({tried})", hint=_HINT)


def _state(peer: FetchPeer, plan: FetchPlan) -> str:
    if peer.is_refused:
        return f"refused, {peer.reason}"
    if not peer.is_usable:
        return peer.reason
    return "it does not have what is missing" if plan.lacks(peer.peer.key) else "it is connected"
