"""A device that slows down in use: the head notices, says what a better plan would give, and loads it when told to."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from devices.cache import probe_devices
from devices.device import DeviceRequest
from devices.discover import device_requests
from devices.measure import Measured
from shard.machine import cores_allowed
from tests.e2e.potluck_process import ASK_S, GONE_S, READY_S, Home, Running, wait_until

# The command itself, with less patience: minutes are for people.
IMPATIENT = """
import sys, potluck.calibration, potluck.head, potluck.cli
potluck.calibration.PERSISTS_S, potluck.calibration.PERSISTS_STEPS, potluck.head._WATCH_INTERVAL_S = 3.0, 50, 0.5
sys.exit(potluck.cli.main())
"""
ARGUMENTS = ("--use-all", "--estimate", "--objective", "latency", "--concurrency", "1", "--threads", "1", "--port", "0")
DEVICES = ("torch:cpu", "torch:cpu")


def know_two_alike(cache: Path) -> None:
    """As if this host's devices had been measured while it was quiet: equal, and about as fast as they are here."""

    def measured(requests: Sequence[DeviceRequest]) -> list[Measured | str]:
        one = Measured(
            bandwidth_bytes_per_s=2e10, compute_dtype="bfloat16", uses_host_memory=True, limit_bytes=None, gpu=""
        )
        return [one] * len(requests)

    requests = device_requests(DEVICES, threads=1, cores_allowed=cores_allowed(), memory_bytes=None)
    probe_devices(requests, cache, fresh=True, prober=measured)


class Slowed:
    """A process that stands still for five sixths of the time, as a laptop that is too hot."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.is_set():
            os.kill(self._pid, signal.SIGSTOP)
            time.sleep(0.05)
            os.kill(self._pid, signal.SIGCONT)
            time.sleep(0.01)


def test_a_better_plan_is_found_and_loaded(home: Home, tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(home.data / "models")
    home = replace(home, data=tmp_path)
    know_two_alike(tmp_path / "probe.json")
    devices = [word for device in DEVICES for word in ("--device", device)]
    command = [sys.executable, "-P", "-c", IMPATIENT]
    running = Running(home, "up", "smollm2", *devices, *ARGUMENTS, "--json", command=command)
    url = running.facts()["url"]

    def report() -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{url}/potluck/status", timeout=ASK_S).json()
        return found

    def chat(max_tokens: int) -> httpx.Response:
        body = {"model": "smollm2", "messages": [{"role": "user", "content": "Count."}], "max_tokens": max_tokens}
        return httpx.post(f"{url}/v1/chat/completions", json={**body, "logit_bias": {"2": -100}}, timeout=ASK_S)

    def share(device: str) -> int:
        return sum(stage["last"] - stage["first"] for stage in report()["stages"] if stage["device"] == device)

    busiest = max(report()["stages"], key=lambda stage: stage["last"] - stage["first"])
    before = share(busiest["device"])
    assert home.run("replan").stdout.strip() == "The ring runs by the best plan known."
    slowed = Slowed(busiest["pid"])
    try:
        deadline = time.monotonic() + READY_S
        while report()["better_plan"] is None:
            assert time.monotonic() < deadline, running.said()
            assert chat(40).status_code == 200
    finally:
        slowed.end()
    assert "A better plan exists" in running.said()
    better = report()["better_plan"]
    assert better["tokens_per_s"] > 1.05 * better["now_tokens_per_s"]
    assert busiest["device"] in better["why"]
    assert home.run("replan").returncode == 0
    wait_until(lambda: "by the better plan" in running.said(), GONE_S, running.said)
    wait_until(lambda: report()["state"] == "ready", READY_S, running.said)
    assert share(busiest["device"]) < before
    spans = [f"{one['device']}: layers {one['first']}–{one['last'] - 1}" for one in report()["stages"]]
    assert spans == better["stages"]
    assert chat(4).status_code == 200
    assert json.loads(home.run("status", "--json").stdout)["better_plan"] is None
    running.stop()
