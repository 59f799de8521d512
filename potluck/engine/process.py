"""The engine's process: `python -P -m potluck.engine.process --settings JSON`, with a lifeline on standard input.

Its own process, because a busy Python thread beside the engine's would cost every hop milliseconds.
"""

from __future__ import annotations

import argparse
import gc
import logging
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec
import zmq

from potluck.engine.loop import Engine
from potluck.engine.server import EngineServer
from potluck.engine.settings import EngineLimits, EngineSettings
from potluck.engine.tokenizer import Tokenizer
from transport.codec import EdgeLimits
from transport.links.secure_endpoints import SecureEndpoints
from transport.links.zmq_link import ZmqReceiver, ZmqSender
from transport.process.child import lowered_priority, start_parent_watch
from transport.security.curve import KeyPair, read_keys

# The first stage listens before it loads, but its process may still be starting.
_FIRST_STAGE_TIMEOUT_S = 60.0
_SWITCH_INTERVAL_S = 0.0005


def serve(settings: EngineSettings) -> None:
    """Run the engine until its ring is down or its parent is gone."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    edge = EdgeLimits(
        fence=settings.fence,
        hidden_size=settings.hidden_size,
        dtype=settings.wire_dtype,
        vocab_size=settings.vocab_size,
        context_tokens=settings.context_tokens,
        max_step_tokens=settings.max_step_tokens,
    )
    keys = read_keys(Path(settings.keys)) if settings.keys is not None else None
    edges = _edges(context, keys)
    # Bound first: the last stage may be loaded before the tokenizer is.
    receiver = ZmqReceiver(
        context,
        settings.listen,
        edge,
        listener=settings.listener,
        guard=edges.guard(settings.listen, settings.upstream),
    )
    tokenizer = Tokenizer(Path(settings.model_path))
    sender = ZmqSender(
        context,
        settings.first_stage,
        edge,
        name="the engine",
        connect_timeout_s=_FIRST_STAGE_TIMEOUT_S,
        prepare=edges.client_auth(settings.first_stage, settings.first_stage_key),
    )
    with lowered_priority():
        # A context of its own, whose thread for sockets gives way too.
        api_context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        server = EngineServer(api_context, settings.api, guard=_edges(api_context, keys).guard(settings.api, ""))
    engine = Engine(
        model=settings.model,
        sender=sender,
        receiver=receiver,
        tokenizer=tokenizer,
        limits=EngineLimits(
            context_tokens=settings.context_tokens,
            kv_capacity_tokens=settings.kv_capacity_tokens,
            vocab_size=settings.vocab_size,
            num_stages=settings.num_stages,
            stage_times=settings.stage_times,
            hops_s=settings.hops_s,
            has_window=settings.has_window,
            prefix_cache=settings.prefix_cache,
        ),
        fence=settings.fence,
        emit=server.emit,
        clock=time.monotonic,
    )
    server.serve(engine)
    # What is here stays: the collector need not look through it again and again.
    gc.collect()
    gc.freeze()
    engine.run()
    # The ring is down: requests are still answered, with the reason, until the parent ends this process.
    threading.Event().wait()


def _edges(context: zmq.Context[zmq.Socket[bytes]], keys: KeyPair | None) -> SecureEndpoints:
    """It is told where to listen, and has no folder or address of its own."""
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
