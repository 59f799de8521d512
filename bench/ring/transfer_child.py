"""One host of the transfer bench gives pieces and gets those it is told to; beside it, bare CURVE."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq

from potluck.measure.child_process import reply_pipe, send_reply, serve_commands
from transport.links.endpoints import tcp_endpoint
from transport.links.zmq_link import set_bulk_options
from transport.messages.pieces import MAX_REPLY_FRAME_BYTES, PART_BYTES, Piece, PieceList
from transport.messages.pool import PieceHint, PiecePeer, SharedModel
from transport.pieces.client import measure_link_speed
from transport.pieces.fetcher import fetch
from transport.pieces.piece_source import FolderSource, StoreSource
from transport.pieces.server import PieceServer
from transport.pieces.store import PieceStore
from transport.process.files import FileStamp
from transport.security.curve import Curve, allow_only, new_key_pair

_WAIT_MS = 30_000


def send_bare(context: zmq.Context[zmq.Socket[bytes]], curve: Curve, key: str, num_bytes: int) -> str:
    """Send so much to the first who asks and has `key`. Returns the endpoint."""
    sock = context.socket(zmq.ROUTER)
    set_bulk_options(sock, max_message_bytes=MAX_REPLY_FRAME_BYTES)
    sock.setsockopt(zmq.SNDHWM, 8)
    sock.setsockopt(zmq.RCVTIMEO, _WAIT_MS)
    sock.setsockopt(zmq.SNDTIMEO, _WAIT_MS)
    curve.guard(allow_only(key)).prepare(sock)
    sock.bind("tcp://127.0.0.1:*")
    endpoint = sock.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def give() -> None:
        who, _ = sock.recv_multipart()
        part = bytes(PART_BYTES)
        for _ in range(num_bytes // PART_BYTES):
            sock.send(who, zmq.SNDMORE)
            sock.send(part)
        sock.recv_multipart()  # It has all.
        sock.close(0)

    threading.Thread(target=give, daemon=True).start()
    return endpoint


def receive_bare(
    context: zmq.Context[zmq.Socket[bytes]], curve: Curve, endpoint: str, key: str, num_bytes: int
) -> float:
    """Bytes per second, from the first frame to the last."""
    sock = context.socket(zmq.DEALER)
    set_bulk_options(sock, max_message_bytes=MAX_REPLY_FRAME_BYTES)
    sock.setsockopt(zmq.RCVTIMEO, _WAIT_MS)
    sock.setsockopt(zmq.SNDTIMEO, _WAIT_MS)
    curve.client_auth(key)(sock)
    sock.connect(endpoint)
    sock.send(b"all of it")
    sock.recv(copy=False)
    began_s = time.monotonic()
    for _ in range(num_bytes // PART_BYTES - 1):
        sock.recv(copy=False)
    took_s = time.monotonic() - began_s
    sock.send(b"done")
    sock.close(500)
    return (num_bytes - PART_BYTES) / took_s


MODEL_FILE = "model"
LIST_FILE = "list.json"


class TransferHost:
    def __init__(self, name: str, address: str, model: Path, digest: str, replies: int) -> None:
        self._replies = replies
        self._name = name
        self._model = model
        self._digest = digest
        self._members: set[str] = set()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._curve = Curve(self._context, new_key_pair())
        guard = self._curve.guard(self._members.__contains__)
        self._server = PieceServer(self._context, tcp_endpoint(address), guard, [])
        pieces = msgspec.json.decode((model / LIST_FILE).read_bytes(), type=PieceList)
        self._pieces = [Piece(piece.digest, piece.num_bytes) for file in pieces.files for piece in file.pieces]
        if name == "head":
            stamps = {MODEL_FILE: FileStamp.of(model / MODEL_FILE)}
            self._server.sources = (FolderSource(model, pieces, model=digest, stamps=stamps),)

    def facts(self) -> dict[str, Any]:
        return {"peer": [self._name, self._server.endpoint, self._curve.keys.public]}

    def members(self, keys: list[str]) -> dict[str, Any]:
        self._members.update(keys)
        return {}

    def sent(self) -> dict[str, Any]:
        return {"bytes": dict(self._server.sent_by_key)}

    def speed(self, peer: list[str], num_bytes: int) -> dict[str, Any]:
        return {"bytes_per_s": measure_link_speed(PiecePeer(*peer), self._curve, self._context, num_bytes=num_bytes)}

    def bare_give(self, key: str, num_bytes: int) -> dict[str, Any]:
        return {"endpoint": send_bare(self._context, self._curve, key, num_bytes)}

    def bare_take(self, endpoint: str, key: str, num_bytes: int) -> dict[str, Any]:
        return {"bytes_per_s": receive_bare(self._context, self._curve, endpoint, key, num_bytes)}

    def get(
        self, store: str, numbers: list[int], peers: list[list[str]], hints: list[list[Any]], hold_at: float
    ) -> dict[str, Any]:
        """Get these pieces. From `hold_at` of their bytes on nothing more happens: to be killed then."""
        folder = Path(store)
        kept = PieceStore(folder)
        kept.put((self._model / LIST_FILE).read_bytes(), self._digest)
        self._server.sources = (StoreSource(kept),)

        def progress(done: int, total: int) -> None:
            if done >= hold_at * total:
                send_reply(self._replies, {"holds": done})
                sys.stdin.read()

        before = _received_bytes()
        report = fetch(
            {number: self._pieces[number] for number in numbers},
            kept,
            SharedModel(
                name="the bench's model",
                digest=self._digest,
                peers=tuple(PiecePeer(*peer) for peer in peers),
                hints=tuple(PieceHint(*hint) for hint in hints),
            ),
            curve=self._curve,
            context=self._context,
            progress=progress,
        )
        return {
            "seconds": report.seconds,
            "bytes_by_peer": report.bytes_by_peer,
            "card_bytes": _received_bytes() - before,
        }


def _received_bytes() -> int:
    """By this host's network cards. Of packets that they put together, or never took apart, one header counts."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    return sum(int(line.split(":")[1].split()[0]) for line in lines)


def main() -> None:
    replies = reply_pipe()
    host = TransferHost(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4], replies)
    names = ("members", "sent", "speed", "bare_give", "bare_take", "get")
    serve_commands({name: getattr(host, name) for name in names}, host.facts(), replies)


if __name__ == "__main__":
    main()
