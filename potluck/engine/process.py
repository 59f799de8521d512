"""The engine's process: `python -P -m potluck.engine.process --settings JSON`, with a lifeline on standard input.

Its own process, because a busy Python thread beside the engine's would cost every hop milliseconds.
"""

from __future__ import annotations

import argparse
import gc
import logging
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from potluck.engine.loop import Engine, RingEnds
from potluck.engine.server import EngineServer
from potluck.engine.settings import EngineLimits, EngineSettings, RingSpec
from potluck.engine.tokenizer import Tokenizer
from transport.codec import EdgeLimits
from transport.links.endpoints import local_endpoint, tcp_endpoint
from transport.links.link import Sender
from transport.links.secure_endpoints import SecureEndpoints
from transport.links.zmq_link import ZmqReceiver, ZmqSender
from transport.messages.requests import EngineEvent, EngineReady
from transport.process.child import lowered_priority, start_parent_watch
from transport.security.curve import KeyPair, read_keys

_FIRST_STAGE_TIMEOUT_S = 60.0
_SWITCH_INTERVAL_S = 0.0005


class EngineLinks:
    """Opens the engine's ends of rings."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], settings: EngineSettings, keys: KeyPair | None) -> None:
        self._context = context
        self._settings = settings
        self._edges = _edges(context, keys)

    def open(self, ring: RingSpec) -> RingEnds:
        """Raises ConfigError if it can't listen."""
        settings = self._settings
        limits = EdgeLimits(
            fence=ring.fence,
            hidden_size=settings.hidden_size,
            dtype=ring.wire_dtype,
            vocab_size=settings.vocab_size,
            context_tokens=ring.context_tokens,
            max_step_tokens=ring.max_step_tokens,
        )
        if ring.listen == "network" and ring.address is not None:
            endpoint = tcp_endpoint(ring.address)
        else:
            endpoint = local_endpoint(Path(settings.run_dir), f"engine-{ring.fence.epoch}")
        receiver = ZmqReceiver(self._context, endpoint, limits, guard=self._edges.guard(endpoint, ring.upstream))

        def connect(is_cancelled: Callable[[], bool]) -> Sender:
            return ZmqSender(
                self._context,
                ring.first_stage,
                limits,
                name="the engine",
                connect_timeout_s=_FIRST_STAGE_TIMEOUT_S,
                prepare=self._edges.client_auth(ring.first_stage, ring.first_stage_key),
                stop=is_cancelled,
            )

        return RingEnds(
            limits=EngineLimits(
                context_tokens=ring.context_tokens,
                kv_capacity_tokens=ring.kv_capacity_tokens,
                vocab_size=settings.vocab_size,
                num_stages=ring.num_stages,
                stage_times=ring.stage_times,
                hops_s=ring.hops_s,
                has_window=ring.has_window,
                prefix_cache=settings.prefix_cache,
            ),
            receiver=receiver,
            connect=connect,
            endpoint=receiver.endpoint,
        )


def serve(settings: EngineSettings) -> None:
    """Serve the rings that the head attaches, until its parent is gone."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    keys = read_keys(Path(settings.keys)) if settings.keys is not None else None
    links = EngineLinks(context, settings, keys)
    tokenizer = Tokenizer(Path(settings.model_path))
    with lowered_priority():
        # A context of its own, whose thread for sockets gives way too.
        api_context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        server = EngineServer(api_context, settings.api, guard=_edges(api_context, keys).guard(settings.api, ""))

    def emit(event: EngineEvent) -> None:
        if isinstance(event, EngineReady):
            # What is here stays as long as the ring: the collector need not look through it again and again.
            gc.unfreeze()
            gc.collect()
            gc.freeze()
        server.emit(event)

    engine = Engine(model=settings.model, tokenizer=tokenizer, emit=emit, clock=time.monotonic, open_ring=links.open)
    server.serve(engine)
    try:
        engine.run()
    finally:
        server.close()


def _edges(context: zmq.Context[zmq.Socket[bytes]], keys: KeyPair | None) -> SecureEndpoints:
    """It is told where to listen, and has no address of its own."""
    return SecureEndpoints(context, Path(), keys=keys, address=None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="potluck.engine.process", description=__doc__)
    parser.add_argument("--settings", required=True, help="EngineSettings in JSON")
    parser.add_argument("--remove", type=Path, default=None, help="folder to delete if the parent crashes")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The ring's thread must not wait 5 ms, Python's default, for those that tokenize and answer clients.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    start_parent_watch(options.remove)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    serve(msgspec.json.decode(options.settings, type=EngineSettings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
