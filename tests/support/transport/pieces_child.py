"""A process of a pool, which is killed: `serve` gives a store's pieces, `fetch` gets a model and says how far it is.

Its one argument is JSON. It says what happens on stdout and ends with its stdin.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import zmq

from transport.messages.pieces import Piece
from transport.messages.pool import PiecePeer, SharedModel
from transport.pieces.fetcher import fetch
from transport.pieces.piece_source import StoreSource
from transport.pieces.server import PieceServer
from transport.pieces.store import PieceStore
from transport.security.curve import Curve, KeyPair, allow_only


def say(line: object) -> None:
    print(line, flush=True)


def serve(curve: Curve, context: Any, store: PieceStore, told: dict[str, Any]) -> None:
    server = PieceServer(context, "tcp://127.0.0.1:*", curve.guard(allow_only(told["peer"])), [StoreSource(store)])
    say(server.endpoint)
    sys.stdin.read()


def get(curve: Curve, context: Any, store: PieceStore, told: dict[str, Any]) -> None:
    """Stops for good at `hold_at` bytes."""

    def progress(done_bytes: int, total_bytes: int) -> None:
        if done_bytes >= told["hold_at"]:
            say(done_bytes)
            threading.Event().wait()

    pieces = {number: Piece(digest, size) for number, (digest, size) in enumerate(told["pieces"])}
    peer = PiecePeer("head", told["endpoint"], told["peer"])
    shared = SharedModel(name="a model", digest=told["model"], peers=(peer,))
    fetch(pieces, store, shared, curve=curve, context=context, progress=progress)
    say("complete")


def main() -> None:
    told = json.loads(sys.argv[2])
    with zmq.Context() as context:
        curve = Curve(context, KeyPair(public=told["public"], secret=told["secret"]))
        {"serve": serve, "fetch": get}[sys.argv[1]](curve, context, PieceStore(Path(told["folder"])), told)
        curve.close()


if __name__ == "__main__":
    main()
