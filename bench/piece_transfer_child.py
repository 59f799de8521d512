"""One host of `bench.piece_transfer`: gives its pieces, and gets what it is told to get. Its ROLE is "head" or "host".

A head's pieces lie in one file, a host's in stores of its own, of which each measurement has a new one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import zmq

from bench.piece_bare import bare_give, bare_take
from transport.curve import Curve, new_key_pair
from transport.endpoints import tcp_endpoint
from transport.pieces.fetcher import fetch
from transport.pieces.piece import Piece, PieceList
from transport.pieces.piece_source import FolderSource, Stamp, StoreSource
from transport.pieces.server import PieceServer
from transport.pieces.speed import link_speed
from transport.pieces.store import PieceStore
from transport.pool_messages import PieceHint, PiecePeer

MODEL_FILE = "model"
LIST_FILE = "list.json"


class TransferHost:
    def __init__(self, name: str, address: str, model: Path, digest: str) -> None:
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
            found = (model / MODEL_FILE).stat()
            stamps = {MODEL_FILE: Stamp(found.st_size, found.st_mtime_ns)}
            self._server.sources = (FolderSource(model, pieces, model=digest, stamps=stamps),)

    def facts(self) -> dict[str, Any]:
        return {"peer": [self._name, self._server.endpoint, self._curve.keys.public]}

    def members(self, keys: list[str]) -> dict[str, Any]:
        self._members.update(keys)
        return {}

    def sent(self) -> dict[str, Any]:
        return {"bytes": dict(self._server.sent_by_key)}

    def speed(self, peer: list[str], num_bytes: int) -> dict[str, Any]:
        return {"bytes_per_s": link_speed(PiecePeer(*peer), self._curve, self._context, num_bytes=num_bytes)}

    def bare_give(self, key: str, num_bytes: int) -> dict[str, Any]:
        return {"endpoint": bare_give(self._context, self._curve, key, num_bytes)}

    def bare_take(self, endpoint: str, key: str, num_bytes: int) -> dict[str, Any]:
        return {"bytes_per_s": bare_take(self._context, self._curve, endpoint, key, num_bytes)}

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
                print(json.dumps({"holds": done}), flush=True)
                sys.stdin.read()

        before = _received_bytes()
        report = fetch(
            {number: self._pieces[number] for number in numbers},
            kept,
            [PiecePeer(*peer) for peer in peers],
            curve=self._curve,
            context=self._context,
            model=self._digest,
            what="the bench's model",
            hints=[PieceHint(*hint) for hint in hints],
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
    host = TransferHost(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    print(json.dumps(host.facts()), flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        print(json.dumps(getattr(host, told.pop("do"))(**told)), flush=True)


if __name__ == "__main__":
    main()
