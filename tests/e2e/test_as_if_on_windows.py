"""The whole program where its modules see Windows: no ipc, few signals, no descriptors handed on, a lifeline that is
looked at instead of read. What Windows itself does is not proven (see `tests/support/simulated/sitecustomize.py`)."""

from __future__ import annotations

import signal

import httpx
import psutil
import pytest

from tests.support.e2e.potluck_process import ASK_S, GONE_S, Home, Running, up_arguments, wait_until
from tests.support.simulated_system import environment_of


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment_of("Windows").items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("windows")
def test_a_ring_answers_and_a_crash_of_its_head_leaves_nothing(home: Home) -> None:
    devices = ("--device", "torch:cpu", "--device", "torch:cpu")
    running = Running(home, *up_arguments(devices=devices))
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    answer = httpx.post(f"{running.facts()['url']}/v1/chat/completions", json=body, timeout=ASK_S)
    assert answer.json()["usage"]["completion_tokens"] == 4, answer.text
    ours = [process for process in home.processes() if "shard.worker" in process.cmdline()]
    assert len(ours) == 2 and not any(_unix_sockets(process) for process in ours)
    running.stop(signal.SIGKILL)
    (home.runtime / "head.json").unlink()
    wait_until(lambda: home.leftovers() == [], GONE_S, home.leftovers)


def _unix_sockets(process: psutil.Process) -> list[str]:
    """By name: a pair that wakes a thread has none."""
    return [connection.laddr for connection in process.net_connections("unix") if connection.laddr]
