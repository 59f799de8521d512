"""Links between hosts whose network is slow, or gone. In a lab: real sockets over a real, bad network."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from bench.lab import Lab, parse_spec, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

SLOW = {"between": ["sender", "receiver"], "rate": "10mbit", "delay_ms": 5}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    hosts = [{"name": "sender"}, {"name": "receiver"}]
    with Lab(parse_spec({"hosts": hosts, "links": [SLOW]}), store=tmp_path) as lab:
        yield lab


def start_end(lab: Lab, host: str, *arguments: str) -> IO[str]:
    """Its output."""
    child = lab.popen(
        host,
        [sys.executable, "-m", "tests.support.transport.network_end", *arguments],
        environment={"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    return child.stdout


def test_a_step_that_takes_seconds_is_no_silence_and_a_host_that_vanishes_is(lab: Lab) -> None:
    address = lab.address("receiver")
    receiver = start_end(lab, "receiver", "receive", address)
    assert receiver.readline() == "listening\n"
    started = time.monotonic()
    start_end(lab, "sender", "send", address, "2")
    assert receiver.readline() == "step 0\n"
    assert time.monotonic() - started > 3.0  # 4 MB at 10 Mbit/s: twice what a heartbeat waits
    assert receiver.readline() == "step 1\n"
    time.sleep(3.0)  # Idle: heartbeats alone hold it.
    lab.unplug("sender")
    started = time.monotonic()
    assert receiver.readline() == "gone\n"
    assert 0.5 < time.monotonic() - started < 20.0  # TCP itself would try for minutes
