"""What a device of another host says of its measurements can be anything: then it is left out, and the head goes on."""

from __future__ import annotations

import math
from typing import Any

import pytest

from potluck.device_probes import _step_s
from potluck.link_probes import WorkerEnd
from potluck.pool import PoolWorker
from tests.transport.test_control import REGISTER
from tests.transport.test_link_probe import SHAPE
from transport.control import Peer
from transport.errors import BadMessage, StageFailed
from transport.measure_messages import LinkListening, SteadyTime


class Answering:
    """A pool whose worker gives that answer to every question."""

    def __init__(self, answer: Any) -> None:
        self.questions = self
        self._answer = answer

    def ask(self, questions: Any, **_: Any) -> list[Any]:
        return [self._answer for _ in questions]

    def key_of(self, worker: PoolWorker) -> str:
        return ""


def end_at(endpoint: str) -> WorkerEnd:
    worker = PoolWorker(peer=Peer(identity=b"", introduction=REGISTER), is_remote=True)
    return WorkerEnd(Answering(LinkListening(1, endpoint)), worker)  # type: ignore[arg-type]


@pytest.mark.parametrize("endpoint", ["", "nowhere", "ipc:///tmp/control", "ws://192.168.1.7:80", "tcp://*:5"])
def test_the_head_connects_to_no_place_but_a_hosts(endpoint: str) -> None:
    """What is no TCP would not be encrypted, and what is no endpoint would end the head."""
    with pytest.raises(BadMessage):
        end_at(endpoint).listen("network", SHAPE, "")


def test_a_place_of_a_host_is_one() -> None:
    assert end_at("tcp://192.168.1.7:5000").listen("network", SHAPE, "") == "tcp://192.168.1.7:5000"


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 0.0, -1.0])
def test_a_time_that_is_none_is_a_failure(seconds: float) -> None:
    assert isinstance(_step_s(SteadyTime(1, seconds)), StageFailed)
    assert _step_s(SteadyTime(1, 0.5)) == 0.5
