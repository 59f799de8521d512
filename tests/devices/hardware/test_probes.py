"""Real probes in real processes, and what becomes of those that fail or hang."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import psutil
import pytest

from devices.hardware import measure as measure_module
from devices.hardware.device import DeviceRequest
from devices.hardware.measure import BandwidthMeasurement, measure
from devices.hardware.probe import READY
from devices.hardware.probes import run_probes
from transport.process.child import EXIT_ORPHANED


def _request(name: str, backend: str, kind: str) -> DeviceRequest:
    return DeviceRequest(name=name, backend=backend, kind=kind, threads=1)  # type: ignore[arg-type]


def test_probes_of_one_host() -> None:
    """A CPU through both libraries, and a GPU that does not exist: it fails by name and holds nobody up."""
    pytest.importorskip("mlx.core")
    started = time.monotonic()
    cpu, mlx, missing = run_probes(
        [_request("a", "torch", "cpu"), _request("b", "mlx", "mlx"), _request("c", "torch", "cuda:63")]
    )
    assert isinstance(cpu, BandwidthMeasurement) and isinstance(mlx, BandwidthMeasurement)
    assert cpu.compute_dtype == "bfloat16"
    assert 1e8 < cpu.bandwidth_bytes_per_s < 1e13
    assert 1e7 < mlx.bandwidth_bytes_per_s < 1e13
    assert isinstance(missing, str) and "cuda:63" in missing
    assert time.monotonic() - started < 60
    assert not [child for child in psutil.Process().children() if "devices.hardware.probe" in " ".join(child.cmdline())]


def test_a_probe_that_is_not_ready_in_time_is_ended() -> None:
    (reason,) = run_probes([_request("a", "torch", "cpu")], ready_s=0.05)
    assert isinstance(reason, str) and "no answer" in reason
    assert not [child for child in psutil.Process().children() if "devices.hardware.probe" in " ".join(child.cmdline())]


def test_the_command_line_prints_json() -> None:
    command = [sys.executable, "-P", "-m", "devices.hardware.probe", "--backend", "torch", "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
    assert BandwidthMeasurement(**json.loads(done.stdout)).bandwidth_bytes_per_s > 0


def test_a_waiting_probe_ends_with_its_parent_and_not_only_once_its_library_is_loaded() -> None:
    command = [sys.executable, "-P", "-m", "devices.hardware.probe", "--backend", "torch", "--device", "cpu", "--wait"]
    probe = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=400, check=False)
    assert probe.returncode == EXIT_ORPHANED
    assert READY.encode() not in probe.stdout


def test_measuring_counts_bytes_over_the_window() -> None:
    now = 0.0

    class HalfSecondPasses:
        compute_dtype = "bfloat16"
        uses_host_memory = True
        limit_bytes = None
        gpu = ""

        def run(self) -> int:
            nonlocal now
            now += 0.5
            return 1000

    measured = measure(HalfSecondPasses(), clock=lambda: now)  # type: ignore[arg-type]
    assert measured.bandwidth_bytes_per_s == 2000
    assert now == 0.5 + 1.0 and measure_module.MEASURE_S <= 1.0
