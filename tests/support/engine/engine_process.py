"""An engine with scripted stages runs as a process: `python -m tests.support.engine.engine_process ENDPOINT`."""

from __future__ import annotations

import sys
import time

import zmq

from potluck.engine.server import EngineServer
from potluck.engine.settings import EngineLimits
from tests.support.engine.fakes import FENCE, VOCAB, ByteTokenizer, FakeRing, attached_engine


def slowly_forever(prompt: tuple[int, ...], position: int) -> int:
    time.sleep(0.002)
    return ord("x")


def main(endpoint: str) -> None:
    ring = FakeRing(slowly_forever)
    api = EngineServer(zmq.Context(), endpoint)
    engine = attached_engine(
        model="scripted",
        sender=ring.sender,
        receiver=ring.receiver,
        tokenizer=ByteTokenizer(),
        limits=EngineLimits(context_tokens=10**6, kv_capacity_tokens=10**7, vocab_size=VOCAB, num_stages=2),
        fence=FENCE,
        emit=api.emit,
        clock=time.monotonic,
    )
    api.serve(engine)
    engine.run()


if __name__ == "__main__":
    main(sys.argv[1])
