"""A link is measured between two ends, in both directions; who is not there is missed soon."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from tests.support.transport.linked import SHAPE, edges_of, kept_context
from transport.errors import BadMessage, DeadlineExceeded, NeighbourGone
from transport.links import link_probe
from transport.links.link_probe import LinkProbeEnd, link_measurements
from transport.messages.measure import LinkProbed


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with kept_context() as context:
        yield context


def two_ends(context: zmq.Context[zmq.Socket[bytes]], where: str, folder: Path) -> tuple[LinkProbeEnd, LinkProbeEnd]:
    first, second = (
        f"ipc://{folder}/{name}" if where == "ipc" else "tcp://127.0.0.1:*" for name in ("first", "second")
    )
    guards = (edges_of(context).guard(endpoint, "") for endpoint in (first, second))
    one, other = (
        LinkProbeEnd(context, endpoint, SHAPE, guard=guard)
        for endpoint, guard in zip((first, second), guards, strict=True)
    )
    return one, other


@pytest.mark.parametrize("where", ["ipc", "tcp"])
def test_a_link_on_this_host(context: zmq.Context[zmq.Socket[bytes]], where: str, tmp_path: Path) -> None:
    leader, follower = two_ends(context, where, tmp_path)
    with ThreadPoolExecutor(2) as threads:
        prepare = edges_of(context).client_auth(leader.endpoint, "")
        led = threads.submit(leader.run, follower.endpoint, leads=True, prepare=prepare)
        followed = threads.submit(follower.run, leader.endpoint, leads=False, prepare=prepare)
        there, back = link_measurements(led.result(120), followed.result(120))
    leader.close()
    follower.close()
    assert 1e-5 < there.hop_s <= there.hop_p95_s < 10.0
    assert there.hop_s == back.hop_s
    assert 1e4 < there.bytes_per_s < 1e12 and 1e4 < back.bytes_per_s < 1e12


def test_nobody_at_the_other_end(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_probe, "LINK_PROBE_CONNECT_S", 0.3)
    end = LinkProbeEnd(context, f"ipc://{tmp_path}/end", SHAPE)
    started = time.monotonic()
    with pytest.raises(NeighbourGone):
        end.run(f"ipc://{tmp_path}/nobody", leads=True)
    assert time.monotonic() - started < 60
    end.close()


def test_an_end_that_falls_silent(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_probe, "LINK_PROBE_REPLY_S", 0.5)
    leader, mute = two_ends(context, "ipc", tmp_path)
    with pytest.raises(DeadlineExceeded, match="no answer"):
        leader.run(mute.endpoint, leads=True)
    leader.close()
    mute.close()


@given(
    hop_s=st.floats(1e-5, 0.1),
    held_s=st.lists(st.floats(1e-3, 0.1), min_size=10, max_size=40),
    rates=st.tuples(st.floats(1e5, 1e10), st.floats(1e5, 1e10)),
)
def test_what_the_other_end_held_a_message_for_is_not_the_links(
    hop_s: float, held_s: list[float], rates: tuple[float, float]
) -> None:
    leader = LinkProbed(round_trips_s=tuple(2 * hop_s + one for one in held_s), held_s=(), bytes_per_s=rates[0])
    follower = LinkProbed(round_trips_s=(), held_s=tuple(held_s), bytes_per_s=rates[1])
    there, back = link_measurements(leader, follower)
    assert there.hop_s == pytest.approx(hop_s, rel=1e-3)
    assert there.hop_p95_s == pytest.approx(hop_s, rel=1e-3)
    assert (there.bytes_per_s, back.bytes_per_s) == (rates[1], rates[0])


def test_a_link_without_round_trips_is_no_link() -> None:
    nothing = LinkProbed(round_trips_s=(), held_s=(), bytes_per_s=1.0)
    with pytest.raises(DeadlineExceeded):
        link_measurements(nothing, nothing)


@pytest.mark.parametrize(
    "lie",
    [
        {"round_trips_s": (math.nan,) * 9},
        {"round_trips_s": (-1.0,) * 9},
        {"bytes_per_s": 0.0},
        {"bytes_per_s": math.inf},
    ],
)
def test_numbers_that_are_none_are_no_link(lie: dict[str, Any]) -> None:
    """The other end may be another host's, and a plan with them would end the head."""
    honest = LinkProbed(round_trips_s=(0.1,) * 9, held_s=(0.0,) * 9, bytes_per_s=1.0)
    liar = msgspec.structs.replace(honest, **lie)
    for pair in ((honest, liar), (liar, honest)):
        with pytest.raises(BadMessage):
            link_measurements(*pair)


def test_a_slow_direction_is_told_from_a_fast_one(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    """Through a relay that lets 5 MB/s pass one way, which a busy machine can do too, and all the other way."""
    leader, follower = two_ends(context, "tcp", tmp_path)
    with Relay(follower.endpoint, bytes_per_s=5e6) as slow, ThreadPoolExecutor(2) as threads:
        prepare = edges_of(context).client_auth(leader.endpoint, "")
        led = threads.submit(leader.run, slow.endpoint, leads=True, prepare=prepare)
        followed = threads.submit(follower.run, leader.endpoint, leads=False, prepare=prepare)
        there, back = link_measurements(led.result(120), followed.result(120))
    leader.close()
    follower.close()
    assert 0.5 * 5e6 < there.bytes_per_s < 1.3 * 5e6
    assert back.bytes_per_s > 2 * there.bytes_per_s


class Relay:
    """Passes TCP on to `endpoint`, at most `bytes_per_s` of it, in small pieces."""

    def __init__(self, endpoint: str, *, bytes_per_s: float) -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        self._rate = bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Relay:
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _run(self) -> None:
        try:
            while True:
                incoming, _ = self._listener.accept()
                outgoing = socket.create_connection(self._target)
                for source, target, rate in ((incoming, outgoing, self._rate), (outgoing, incoming, 0.0)):
                    threading.Thread(target=self._pass, args=(source, target, rate), daemon=True).start()
        except OSError:
            return

    def _pass(self, source: socket.socket, target: socket.socket, rate: float) -> None:
        free_s = time.perf_counter()
        try:
            while data := source.recv(2**14):
                target.sendall(data)
                if rate:
                    free_s = max(free_s, time.perf_counter() - 0.01) + len(data) / rate
                    time.sleep(max(0.0, free_s - time.perf_counter()))
        except OSError:
            return
