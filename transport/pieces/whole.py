"""Gets one small thing as a whole, in memory: a model's piece list."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence

import zmq

from transport.curve import Curve
from transport.errors import BadMessage, DownloadFailed
from transport.pieces.messages import PART_BYTES, Ask, Missing, Part, Refused
from transport.pieces.peer_line import PeerLine
from transport.pool_messages import PiecePeer

log = logging.getLogger("potluck.pieces")

_SILENT_AFTER_S = 5.0
_AGAIN_S = 0.5
_TICK_S = 0.05


class _Failed(Exception):
    """What this peer did not do."""


def fetch_bytes(
    digest: str,
    peers: Sequence[PiecePeer],
    max_bytes: int,
    *,
    curve: Curve,
    context: zmq.Context[zmq.Socket[bytes]],
    what: str,
    stop: Callable[[], bool] = lambda: False,
    patience_s: float = 30.0,
) -> bytes:
    """What has the SHA-256 `digest`, from one of the peers, which are tried in turn until `patience_s` have passed.
    Raises DownloadFailed if none has it, or when it is stopped."""
    give_up_at_s = time.monotonic() + patience_s
    reasons: dict[str, str] = {}
    refused: set[str] = set()
    while True:
        for peer in peers:
            if peer.key in refused:
                continue
            try:
                found = _from(peer, digest, max_bytes, curve, context, stop)
            except (_Failed, BadMessage) as error:
                reasons[peer.name] = str(error)
                continue
            if hashlib.sha256(found).hexdigest() == digest:
                return found
            reasons[peer.name] = "it sent wrong bytes"
            refused.add(peer.key)
            log.warning("nothing more is taken from %s: it sent wrong bytes for %s", peer.name, what)
        if stop() or time.monotonic() >= give_up_at_s or len(refused) == len(peers):
            break
        time.sleep(_AGAIN_S)
    tried = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "no host offers it"
    raise DownloadFailed(
        f"{what} can't be got from the pool ({tried})", hint="is the head running, and reachable from here?"
    )


def _from(
    peer: PiecePeer,
    digest: str,
    max_bytes: int,
    curve: Curve,
    context: zmq.Context[zmq.Socket[bytes]],
    stop: Callable[[], bool],
) -> bytes:
    """Part by part until one is short. Raises _Failed, BadMessage."""
    line = PeerLine(context, peer, curve)
    parts: list[bytes] = []
    offset = 0
    try:
        while True:
            part = _part(line, Ask(len(parts), digest, offset, PART_BYTES), stop)
            parts.append(part)
            offset += len(part)
            if offset > max_bytes:
                raise _Failed(f"it has more than {max_bytes} bytes for it")
            if len(part) < PART_BYTES:
                return b"".join(parts)
    finally:
        line.close()


def _part(line: PeerLine, ask: Ask, stop: Callable[[], bool]) -> bytes:
    silent_at_s = time.monotonic() + _SILENT_AFTER_S
    is_sent = False
    while time.monotonic() < silent_at_s:
        if stop():
            raise _Failed("it was stopped")
        line.look()
        if not is_sent and line.is_open:
            is_sent = line.send(ask)
        zmq.zmq_poll([(line.socket, zmq.POLLIN), (line.monitor, zmq.POLLIN)], int(_TICK_S * 1000))
        for answer, buffer in line.received():
            match answer:
                case Part(token=ask.token, offset=ask.offset):
                    return bytes(buffer)
                case Missing():
                    raise _Failed("it does not have it")
                case Refused(reason=reason):
                    raise _Failed(f"it refused: {reason!r}")
                case _:
                    raise BadMessage("it sent what was not asked for")
        if line.lost:
            raise _Failed(line.lost)
    raise _Failed(f"it was silent for {_SILENT_AFTER_S:.0f} s")
