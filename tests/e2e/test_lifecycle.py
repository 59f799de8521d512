"""However a head ends, nothing is left; whatever goes wrong while it serves, its clients hear of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.e2e.potluck_process import ASK_S, GONE_S, READY_S, Home, Running, up_arguments, wait_until

ONE_DEVICE = ("--device", "torch:cpu")
# They start in half the time that torch takes.
TWO_DEVICES = ("--device", "mlx", "--device", "mlx")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_is_left_however_it_ends(home: Home, number: signal.Signals) -> None:
    running = Running(home, *up_arguments(devices=TWO_DEVICES))
    running.facts()
    assert len(home.processes()) == 5  # head, engine, what renders its templates, two workers
    running.stop(number)
    if number == signal.SIGKILL:
        (home.runtime / "head.json").unlink()  # a plain file, not a head: the next command sees that its lock is free
    wait_until(lambda: home.leftovers() == [], GONE_S, home.leftovers)


def test_nothing_is_left_when_it_is_interrupted_while_loading(home: Home) -> None:
    running = Running(home, *up_arguments(devices=TWO_DEVICES))
    wait_until(lambda: len(home.processes()) >= 3, READY_S)
    running.stop(signal.SIGINT)
    wait_until(lambda: home.leftovers() == [], GONE_S, home.leftovers)


def test_nothing_is_left_when_it_crashes_while_measuring(home: Home, data_home: Path, tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(data_home / "models")
    fresh = Home(data=tmp_path, runtime=home.runtime)  # nothing is measured yet
    (home.runtime / "run-of-an-old-crash").mkdir()
    running = Running(fresh, *up_arguments(devices=TWO_DEVICES))
    wait_until(lambda: bool(processes(home, "devices.hardware.probe")), READY_S, running.said)
    running.stop(signal.SIGKILL)
    wait_until(lambda: not home.processes(), GONE_S, home.leftovers)
    wait_until(lambda: not [path for path in home.runtime.rglob("*") if path.is_socket()], GONE_S)
    running = Running(home, *up_arguments(devices=ONE_DEVICE))
    running.facts()
    assert not (home.runtime / "run-of-an-old-crash").exists()
    running.stop()
    assert home.leftovers() == []


@pytest.mark.parametrize("module", ["shard.worker", "potluck.engine.process"])
def test_a_process_that_dies_before_it_has_loaded_is_named_at_once(home: Home, module: str) -> None:
    running = Running(home, *up_arguments(devices=TWO_DEVICES))
    wait_until(lambda: bool(processes(home, module)), READY_S, running.said)
    processes(home, module)[0].kill()
    assert running.process.wait(GONE_S) == 1
    said = running.said()
    assert "ended" in said and "9" in said and "does not take messages" not in said
    assert home.leftovers() == []


def processes(home: Home, module: str) -> list[psutil.Process]:
    return [process for process in home.processes() if module in process.cmdline()]


def test_a_second_head_says_which_one_runs(home: Home) -> None:
    running = Running(home, *up_arguments(devices=ONE_DEVICE))
    facts = running.facts()
    second = home.run(*up_arguments(devices=ONE_DEVICE))
    assert second.returncode == 1
    assert facts["url"] in second.stderr
    assert str(running.process.pid) in second.stderr
    status = home.run("status", "--json")
    assert json.loads(status.stdout)["state"] == "ready"
    running.stop()
    after = home.run("status")
    assert after.returncode == 1
    assert "no head runs" in after.stderr


def test_a_port_in_use(home: Home) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = home.run("up", "smollm2", "--device", "torch:cpu", "--port", str(port))
    assert done.returncode == 1
    assert str(port) in done.stderr
    assert "hint" in done.stderr
    assert home.leftovers() == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["up", "no-such-model"], ["no-such-model", "hint"]),
        (["up", "file:/no/such/file.gguf"], ["/no/such/file.gguf"]),
        (["up", "smollm2", "--context", "1000000"], ["1,000,000", "8192", "hint"]),
        (["up", "smollm2", "--device", "torch:cpu", "--memory", "50MB"], ["GiB", "hint"]),
        (["up", "smollm2", "--device", "abacus"], ["abacus", "hint"]),
        (["up", "smollm2", "--memory", "lots"], ["lots", "hint"]),
        (["up", "smollm2", "--port", "99999"], ["99999"]),
        (["up"], ["no model", "hint"]),
        (["join"], ["no head runs on this host", "--head", "hint"]),
        (["chat"], ["no head runs", "hint"]),
        (["rm", "no-such-model"], ["no-such-model"]),
        (["show", "no-such-model"], ["no-such-model"]),
        (["pull", "pypi:no such thing"], ["no such thing"]),
        (["plan", "smollm2", "--memory", "50MB", "--device", "torch:cpu"], ["GiB", "hint"]),
    ],
)
def test_bad_input_ends_with_the_next_step(
    home: Home,
    arguments: list[str],
    words: list[str],
) -> None:
    # A head of the developer's own may have the usual port.
    port = ("--port", "0") if arguments[0] == "up" and "--port" not in arguments else ()
    done = home.run_here(*arguments, *port)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert home.leftovers() == []


def test_a_bad_config_file(home: Home) -> None:
    (home.runtime / "config.toml").write_text("prot = 1\n")
    done = home.run("up", "smollm2")
    assert done.returncode == 1
    assert "prot" in done.stderr
    assert "port" in done.stderr


def stream_lines(url: str, found: list[str], max_tokens: int = 1500) -> None:
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Write a very long story."}],
        "max_tokens": max_tokens,
        "stream": True,
        "logit_bias": {"2": -100},
    }
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=ASK_S) as response:
        for line in response.iter_lines():
            if line.startswith("data:"):
                found.append(line)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_worker_that_dies_ends_its_requests_and_the_ring(home: Home, stage: int) -> None:
    running = Running(home, *up_arguments(devices=TWO_DEVICES))
    facts = running.facts()
    url = facts["url"]
    lines: list[str] = []
    thread = threading.Thread(target=stream_lines, args=(url, lines))
    thread.start()
    wait_until(lambda: len(lines) > 3, ASK_S)
    os.kill(facts["stages"][stage]["pid"], signal.SIGKILL)
    thread.join(GONE_S)
    assert not thread.is_alive()
    last = json.loads(lines[-1].removeprefix("data:"))
    assert last["error"]["code"] == "ring_down"
    assert not any("[DONE]" in line for line in lines)

    wait_until(lambda: httpx.get(f"{url}/health", timeout=ASK_S).status_code == 503, GONE_S)
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "hi"}]}
    refused = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=ASK_S)
    assert refused.status_code == 503
    status = json.loads(home.run("status", "--json").stdout)
    assert status["state"] == "down"
    assert "signal 9" in status["error"]
    assert "signal 9" in running.said()
    running.stop()


def test_an_engine_that_dies_is_replaced_and_the_ring_loaded_anew(home: Home) -> None:
    running = Running(home, *up_arguments(devices=TWO_DEVICES))
    url = running.facts()["url"]
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 8,
        "temperature": 0,
    }

    def answer() -> str:
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=ASK_S)
        text: str = response.json()["choices"][0]["message"]["content"] if response.status_code == 200 else ""
        return text

    before = answer()
    assert before
    engine = processes(home, "potluck.engine.process")[0]
    engine.kill()
    wait_until(lambda: httpx.get(f"{url}/health", timeout=ASK_S).status_code == 503, GONE_S)
    wait_until(lambda: "Ready at" in running.said(), READY_S, running.said)
    assert "the engine ended with exit code -9" in running.said()
    assert answer() == before
    assert engine.pid not in {process.pid for process in home.processes()}
    running.stop()
    assert home.leftovers() == []


def test_a_worker_that_stops_answering_is_found_and_named(home: Home) -> None:
    running = Running(home, *up_arguments(devices=TWO_DEVICES))
    facts = running.facts()
    lines: list[str] = []
    thread = threading.Thread(target=stream_lines, args=(facts["url"], lines))
    thread.start()
    wait_until(lambda: len(lines) > 3, ASK_S)
    os.kill(facts["stages"][0]["pid"], signal.SIGSTOP)
    thread.join(GONE_S)
    assert not thread.is_alive()
    assert json.loads(lines[-1].removeprefix("data:"))["error"]["code"] == "ring_down"
    # Its neighbour noticed first; the head replaces that by the cause.
    wait_until(lambda: "mlx-1 left or went silent" in home.run("status", "--json").stdout, GONE_S, running.said)
    running.stop()


def test_a_pause_of_the_whole_host_costs_nobody_anything(home: Home, another_home: Home) -> None:
    """A closed lid, or a machine that stands still: longer than anybody is patient with a silent process. Also where
    other hosts may join."""
    homes = {home: (), another_home: ("--lan-host", "127.0.0.1", "--lan-port", "0", "--host-name", "alpha")}
    heads = {each: Running(each, *up_arguments(*options, devices=TWO_DEVICES)) for each, options in homes.items()}
    streams: dict[Home, list[str]] = {each: [] for each in homes}
    threads = {
        each: threading.Thread(target=stream_lines, args=(head.facts()["url"], streams[each], 60))
        for each, head in heads.items()
    }
    processes: list[psutil.Process] = []
    for each, thread in threads.items():
        ours = each.processes()
        thread.start()
        wait_until(lambda lines=streams[each]: len(lines) > 3, ASK_S)  # type: ignore[misc]
        for process in ours:
            process.suspend()
        processes += ours
    time.sleep(11.0)
    paused_at = {each: len(lines) for each, lines in streams.items()}
    for process in processes:
        process.resume()
    for each, lines in streams.items():
        threads[each].join(ASK_S)
        assert not threads[each].is_alive()
        assert len(lines) > paused_at[each]
        assert lines[-1] == "data: [DONE]", lines[-1]
        assert json.loads(each.run("status", "--json").stdout)["state"] == "ready"
        heads[each].stop()


def test_a_wedged_worker_at_load_is_not_waited_for_when_interrupted(home: Home) -> None:
    running = Running(home, *up_arguments(devices=TWO_DEVICES))
    wait_until(lambda: len(home.processes()) >= 3, READY_S)
    for process in home.processes():
        if "shard.worker" in " ".join(process.cmdline()):
            process.suspend()
    time.sleep(0.5)
    running.stop(signal.SIGTERM)
    wait_until(lambda: home.leftovers() == [], GONE_S, home.leftovers)


def test_a_device_joins_and_leaves(home: Home) -> None:
    running = Running(home, *up_arguments(devices=ONE_DEVICE))
    url = running.facts()["url"]
    joined = Running(home, "join", "--device", "torch:cpu", "--threads", "1", "--name", "second")

    def stages() -> list[dict[str, Any]]:
        report: dict[str, Any] = httpx.get(f"{url}/potluck/status", timeout=ASK_S).json()
        return report["stages"] if report["state"] == "ready" else []

    wait_until(lambda: len(stages()) == 2, READY_S, running.said)
    assert stages()[1]["device"] == "second/cpu"
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=ASK_S).status_code == 200
    joined.stop()
    wait_until(lambda: httpx.get(f"{url}/health", timeout=ASK_S).status_code == 503, GONE_S)
    wait_until(lambda: "second/cpu left" in running.said(), GONE_S, running.said)
    running.stop()


@pytest.mark.parametrize("after_s", [0.1, 0.2, 0.4])
def test_an_interrupt_while_it_is_imported_is_no_traceback(home: Home, after_s: float) -> None:
    code = "from potluck.entry import main; print('{}', flush=True); main()"
    running = Running(home, "status", command=[sys.executable, "-P", "-c", code])
    running.facts()
    time.sleep(after_s)
    assert running.stop(signal.SIGINT) in (1, 130)  # 1: no head runs, and it had said so already
    assert "Traceback" not in running.said()
