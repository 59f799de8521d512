"""Several hosts, here all on the loopback address: their ring runs over TCP, and never leaves the host unasked."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import httpx
import pytest

from tests.e2e.potluck_process import Home, Running, up_arguments, wait_until

ONE_DEVICE = ("--device", "torch:cpu")
LOOPBACK = ("--lan-host", "127.0.0.1")


def stages(url: str) -> list[dict[str, Any]]:
    report: dict[str, Any] = httpx.get(f"{url}/potluck/status", timeout=10).json()
    return report["stages"] if report["state"] == "ready" else []


def answer(url: str) -> str:
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Name three fruits."}],
        "max_tokens": 12,
        "temperature": 0,
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def join(home: Home, lan: str, host: str) -> Running:
    return Running(home, "join", "--head", lan, *LOOPBACK, "--host-name", host, *ONE_DEVICE, "--threads", "1")


def test_two_hosts_answer_as_one_does_and_the_head_notices_when_one_goes(home: Home) -> None:
    running = Running(home, *up_arguments(*LOOPBACK, "--host-name", "alpha", devices=ONE_DEVICE))
    facts = running.facts()
    url, lan = facts["url"], facts["lan"]
    alone = answer(url)
    joined = join(home, lan, "beta")
    wait_until(lambda: len(stages(url)) == 2, 90.0, running.said)
    assert [(stage["host"], stage["device"]) for stage in stages(url)] == [("alpha", "cpu"), ("beta", "beta/cpu")]
    assert answer(url) == alone
    joined.stop()
    wait_until(lambda: httpx.get(f"{url}/health", timeout=5).status_code == 503, 15.0)
    running.stop()
    left = home.leftovers()
    assert left == []


def test_a_second_host_of_the_same_name_is_told_so(home: Home) -> None:
    running = Running(home, *up_arguments(*LOOPBACK, "--host-name", "alpha", devices=ONE_DEVICE))
    lan = running.facts()["lan"]
    same = home.run("join", "--head", lan, "--lan-host", "127.0.0.2", "--host-name", "alpha", *ONE_DEVICE)
    assert same.returncode == 1
    assert "another host called alpha" in same.stderr
    assert "--host-name" in same.stderr
    running.stop()


def test_a_joined_host_that_crashes_leaves_nothing(home: Home) -> None:
    running = Running(home, *up_arguments(*LOOPBACK, "--host-name", "alpha", devices=ONE_DEVICE))
    facts = running.facts()
    joined = join(home, facts["lan"], "beta")
    wait_until(lambda: len(stages(facts["url"])) == 2, 90.0, running.said)
    os.kill(joined.process.pid, signal.SIGKILL)
    joined.process.wait()
    wait_until(lambda: httpx.get(f"{facts['url']}/health", timeout=5).status_code == 503, 15.0)
    running.stop()
    left = home.leftovers()
    assert left == []


def test_the_status_says_where_hosts_join(home: Home) -> None:
    running = Running(home, *up_arguments(devices=ONE_DEVICE))
    running.facts()
    assert json.loads(home.run("status", "--json").stdout)["lan"] is None
    running.stop()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["up", "smollm2", "--port", "0", "--lan-host", "0.0.0.0"], ["0.0.0.0", "hint"]),
        (["up", "smollm2", "--port", "0", "--lan-host", "203.0.113.7", "--insecure-lan"], ["203.0.113.7", "hint"]),
        (["up", "smollm2", "--port", "0", "--lan-host", "kitchen"], ["kitchen", "IPv4"]),
        (["up", "smollm2", "--port", "0", "--host-name", "a/b"], ["a/b", "hint"]),
        (["up", "smollm2", "--port", "0", "--lan-host", "127.0.0.1", "--lan-port", "70000"], ["70000"]),
        (["join", "--head", "203.0.113.7:11501"], ["203.0.113.7:11501", "--insecure-lan"]),
        (["join", "--head", "127.0.0.1:1"], ["127.0.0.1:1", "hint"]),
        (["join", "--head", "127.0.0.1"], ["127.0.0.1", "HOST:PORT"]),
        (["join", "--head", "no-such-host.invalid:5"], ["no-such-host.invalid", "hint"]),
        (["join", "--host-name", "other"], ["--host-name", "--head"]),
    ],
)
def test_bad_input_ends_with_the_next_step(home: Home, arguments: list[str], words: list[str]) -> None:
    done = home.run(*arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
