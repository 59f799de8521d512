"""Measurements are remembered for the same set of devices, and a bad cache is only a slow start."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from devices.hardware import probes
from devices.hardware.device import DeviceRequest
from devices.hardware.measure import BandwidthMeasurement
from devices.hardware.memory import Gpu
from devices.hardware.probes import probe_devices
from devices.hardware.selection import device_requests
from transport.process import cpu_use

GIB = 2**30


@dataclass
class FakeProber:
    results: list[BandwidthMeasurement | str]
    calls: list[list[str]] = field(default_factory=list)

    def __call__(self, requests: Sequence[DeviceRequest]) -> list[BandwidthMeasurement | str]:
        self.calls.append([request.name for request in requests])
        return self.results


def _measured(bandwidth: float = 1e9, **changes: object) -> BandwidthMeasurement:
    facts: dict[str, object] = {
        "bandwidth_bytes_per_s": bandwidth,
        "compute_dtype": "bfloat16",
        "uses_host_memory": True,
        "limit_bytes": None,
        "gpu": "",
    }
    return BandwidthMeasurement(**{**facts, **changes})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "host_free_bytes", lambda: 8 * GIB)
    monkeypatch.setattr(probes, "list_gpus", lambda: [Gpu(uuid="GPU-1", free_bytes=3 * GIB)])


def test_second_time_from_the_cache_with_fresh_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prober = FakeProber([_measured(2e9), _measured(3e9, compute_dtype="float32")])
    requests, path = device_requests(["cpu", "mlx"]), tmp_path / "deep" / "probes.json"
    said: list[str] = []
    first = probe_devices(requests, path, prober=prober, on_measuring=lambda: said.append("measuring"))
    monkeypatch.setattr(probes, "host_free_bytes", lambda: 5 * GIB)
    second = probe_devices(requests, path, prober=prober, on_measuring=lambda: said.append("measuring"))
    assert len(prober.calls) == len(said) == 1
    assert [d.bandwidth_bytes_per_s for d in second.devices] == [2e9, 3e9]
    assert [d.free_bytes for d in (*first.devices, *second.devices)] == [8 * GIB] * 2 + [5 * GIB] * 2
    assert len({d.memory_pool for d in second.devices}) == 1
    probe_devices(requests, path, fresh=True, prober=prober)
    assert len(prober.calls) == 2


def test_another_set_of_devices_is_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "probes.json"
    one, two = FakeProber([_measured()]), FakeProber([_measured(), _measured()])
    probe_devices(device_requests(["cpu"], threads=1), path, prober=one)
    probe_devices(device_requests(["cpu"], threads=2), path, prober=one)
    probe_devices(device_requests(["cpu", "cpu"], threads=1), path, prober=two)
    assert (len(one.calls), len(two.calls)) == (2, 1)
    probe_devices(device_requests(["cpu"], threads=1), path, prober=one)
    assert len(one.calls) == 2


def test_other_library_versions_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prober = FakeProber([_measured()])
    probe_devices(device_requests(["cpu"]), tmp_path / "c", prober=prober)
    monkeypatch.setattr(probes, "_version", lambda package: "99")
    probe_devices(device_requests(["cpu"]), tmp_path / "c", prober=prober)
    assert len(prober.calls) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 1, "entries": 3}', '{"version": 0}', "\0\0", "records"])
def test_a_corrupt_cache_is_measured_again(damage: str, tmp_path: Path) -> None:
    path, requests, prober = tmp_path / "probes.json", device_requests(["cpu"]), FakeProber([_measured()])
    probe_devices(requests, path, prober=prober)
    if damage == "records":
        data = json.loads(path.read_text())
        for records in data["entries"].values():
            records[0]["bandwidth_bytes_per_s"] = -1.0
        damage = json.dumps(data)
    path.write_text(damage)
    assert probe_devices(requests, path, prober=prober).devices
    assert len(prober.calls) == 2
    probe_devices(requests, path, prober=prober)
    assert len(prober.calls) == 2


def test_a_cache_that_can_not_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert probe_devices(device_requests(["cpu"]), tmp_path / "file" / "c", prober=FakeProber([_measured()])).devices
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_probe_leaves_its_device_out_and_is_not_remembered(tmp_path: Path) -> None:
    prober = FakeProber([_measured(), "no driver"])
    for _ in range(2):
        probed = probe_devices(device_requests(["cpu", "cuda:0"]), tmp_path / "c", prober=prober)
        assert [d.name for d in probed.devices] == ["cpu"]
        assert [(out.name, out.reason) for out in probed.left_out] == [("cuda:0", "no driver")]
    assert len(prober.calls) == 2


def test_memory_of_a_gpu_is_its_own_and_caps_are_the_owners(tmp_path: Path) -> None:
    gpu = _measured(uses_host_memory=False, limit_bytes=4 * GIB, gpu="GPU-1", compute_dtype="float16")
    requests = device_requests(["cpu", "cuda:0"], memory_bytes=2 * GIB)
    cpu, cuda = probe_devices(requests, tmp_path / "c", prober=FakeProber([_measured(), gpu])).devices
    assert (cpu.free_bytes, cpu.total_bytes) == (2 * GIB, 8 * GIB)
    assert (cuda.free_bytes, cuda.total_bytes) == (2 * GIB, 3 * GIB)
    assert cpu.memory_pool != cuda.memory_pool


def test_a_drivers_limit_bounds_unified_memory(tmp_path: Path) -> None:
    metal = _measured(limit_bytes=6 * GIB)
    cpu, mlx = probe_devices(
        device_requests(["cpu", "mlx"]), tmp_path / "c", prober=FakeProber([_measured(), metal])
    ).devices
    assert (mlx.free_bytes, mlx.total_bytes) == (6 * GIB, 8 * GIB)
    assert cpu.memory_pool == mlx.memory_pool


@dataclass
class Ticking:
    """A clock of hours."""

    hours: float = 1000.0

    def __call__(self) -> float:
        return self.hours * 3600


def test_what_was_measured_beside_other_programs_is_measured_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_use, "num_cores", lambda: 4)
    path, requests, now = tmp_path / "c", device_requests(["cpu"]), Ticking()
    disturbed = {"busy_cores": 3.0, "own_cores": 2.0}
    prober = FakeProber([_measured(2e9, **disturbed)])
    assert probe_devices(requests, path, prober=prober, now=now).devices[0].bandwidth_bytes_per_s == 2e9
    probe_devices(requests, path, prober=prober, now=now)
    assert len(prober.calls) == 1  # They are probably still there.
    now.hours += 1
    prober.results = [_measured(1e9, **disturbed)]
    assert probe_devices(requests, path, prober=prober, now=now).devices[0].bandwidth_bytes_per_s == 2e9
    now.hours += 1
    prober.results = [_measured(3e9, busy_cores=2.1, own_cores=2.0)]
    assert probe_devices(requests, path, prober=prober, now=now).devices[0].bandwidth_bytes_per_s == 3e9
    now.hours += 1000
    probe_devices(requests, path, prober=prober, now=now)
    assert len(prober.calls) == 3


def test_where_it_is_never_quiet_measuring_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_use, "num_cores", lambda: 4)
    path, requests, now = tmp_path / "c", device_requests(["cpu", "mlx"]), Ticking()
    prober = FakeProber([_measured(1e9, busy_cores=4.0, own_cores=1.0), _measured(2e9, busy_cores=4.0, own_cores=1.0)])
    for _ in range(6):
        probe_devices(requests, path, prober=prober, now=now)
        now.hours += 1
    assert len(prober.calls) == 3
