"""A device of another host may say anything of its measurements: it is left out, and the head goes on."""

from __future__ import annotations

import math
from typing import Any

import pytest

from potluck.head.pool import PoolWorker
from potluck.head.profiling.probes import WorkerProbeEnd, _step_s
from tests.support.transport.introductions import REGISTER
from tests.support.transport.linked import SHAPE
from transport.control import ControlPeer
from transport.errors import BadMessage, StageFailed
from transport.messages.measure import LinkListening, UnderLoadTime


class Answering:
    """A pool whose worker gives that answer to every question."""

    def __init__(self, answer: Any) -> None:
        self.rpc = self
        self._answer = answer

    def call_all(self, requests: Any, **_: Any) -> list[Any]:
        return [self._answer for _ in requests]

    def key_of(self, worker: PoolWorker) -> str:
        return ""


def end_at(endpoint: str) -> WorkerProbeEnd:
    worker = PoolWorker(peer=ControlPeer(identity=b"", introduction=REGISTER), is_remote=True)
    return WorkerProbeEnd(Answering(LinkListening(1, endpoint)), worker)  # type: ignore[arg-type]


@pytest.mark.parametrize("endpoint", ["", "nowhere", "ipc:///tmp/control", "ws://192.168.1.7:80", "tcp://*:5"])
def test_the_head_connects_to_no_place_but_a_hosts(endpoint: str) -> None:
    """What is no TCP would not be encrypted, and what is no endpoint would end the head."""
    with pytest.raises(BadMessage):
        end_at(endpoint).listen("network", SHAPE, "")


def test_a_place_of_a_host_is_one() -> None:
    assert end_at("tcp://192.168.1.7:5000").listen("network", SHAPE, "") == "tcp://192.168.1.7:5000"


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 0.0, -1.0])
def test_a_time_that_is_none_is_a_failure(seconds: float) -> None:
    assert isinstance(_step_s(UnderLoadTime(1, seconds)), StageFailed)
    assert _step_s(UnderLoadTime(1, 0.5)) == 0.5
