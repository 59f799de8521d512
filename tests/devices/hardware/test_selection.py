"""Device strings, their requests, and nvidia-smi's output."""

from __future__ import annotations

import pytest

from devices.hardware import selection
from devices.hardware.memory import Gpu, parse_gpus
from devices.hardware.selection import default_devices, device_requests, parse_device
from transport.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("torch:cpu", ("torch", "cpu")),
        ("cpu", ("torch", "cpu")),
        (" CUDA:1 ", ("torch", "cuda:1")),
        ("torch:cuda", ("torch", "cuda:0")),
        ("mps", ("torch", "mps")),
        ("mlx", ("mlx", "mlx")),
    ],
)
def test_forms(text: str, wanted: tuple[str, str]) -> None:
    assert parse_device(text) == wanted


@pytest.mark.parametrize(
    "text", ["", "gpu", "torch", "torch:", "mlx:cpu", "mlx:", "cuda:", "cuda:x", "cpu:0", "torch:mlx"]
)
def test_what_is_no_device_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_device(text)
    assert repr(text) in caught.value.message and caught.value.hint


def cores(monkeypatch: pytest.MonkeyPatch, *, physical: int | None, cpus: int) -> None:
    monkeypatch.setattr(selection.psutil, "cpu_count", lambda logical: 64 if logical else physical)
    monkeypatch.setattr(selection, "num_cpus", lambda: cpus)
    monkeypatch.setattr(selection, "_is_apple_silicon", lambda: False)


def test_names_are_unique_and_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, physical=8, cpus=16)
    requests = device_requests(["torch:cpu", "mlx", "cpu", "cuda:0"], memory_bytes=5)
    assert [request.name for request in requests] == ["cpu-1", "mlx", "cpu-2", "cuda:0"]
    assert [request.threads for request in requests] == [2, 2, 2, 1]
    assert {request.memory_bytes for request in requests} == {5}


@pytest.mark.parametrize(
    ("physical", "cpus", "allowed", "wanted"),
    [
        (8, 16, None, 8),  # A thread a core, not one a hyperthread.
        (8, 4, None, 4),  # taskset
        (8, 16, 2.5, 2),  # a container's quota
        (8, 16, 0.5, 1),
        (8, 16, 100.0, 8),
        (None, 6, None, 6),  # a system that does not tell cores from hyperthreads
    ],
)
def test_threads_are_the_cores_that_there_are(
    physical: int | None, cpus: int, allowed: float | None, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(monkeypatch, physical=physical, cpus=cpus)
    assert [request.threads for request in device_requests(["cpu"], cores_allowed=allowed)] == [wanted]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("threads", [None, 1, 4, 16])
def test_workers_of_one_host_never_have_more_threads_than_meant_for_them(
    count: int, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores(monkeypatch, physical=8, cpus=16)
    shares = [request.threads for request in device_requests(["cpu"] * count, threads=threads)]
    meant = 8 if threads is None else threads
    assert min(shares) >= 1 and sum(shares) <= max(meant, count)
    assert len(set(shares)) == 1  # Devices that are alike stay alike.


def test_threads_are_of_the_workers_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, physical=8, cpus=16)
    assert [request.threads for request in device_requests(["cuda:0", "cpu"], threads=6)] == [1, 6]


def test_more_threads_than_cpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, physical=8, cpus=16)
    with pytest.raises(ConfigError, match=r"17 threads .* 16 CPUs") as caught:
        device_requests(["cpu"], threads=17)
    assert "1 to 16" in caught.value.hint


def test_a_gpu_is_named_once() -> None:
    with pytest.raises(ConfigError, match="cuda:0"):
        device_requests(["cuda", "torch:cuda:0"])


@pytest.mark.parametrize(
    ("num_gpus", "apple", "wanted"), [(2, False, ["cuda:0", "cuda:1"]), (0, True, ["mlx"]), (0, False, ["torch:cpu"])]
)
def test_defaults(num_gpus: int, apple: bool, wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx.core")
    monkeypatch.setattr(selection, "num_visible_gpus", lambda: num_gpus)
    monkeypatch.setattr(selection, "_is_apple_silicon", lambda: apple)
    assert default_devices() == wanted


def test_nvidia_smi_lines() -> None:
    text = "GPU-1a, 20480\nGPU-2b, [N/A]\nUnable to determine the device handle\n"
    assert parse_gpus(text) == [Gpu(uuid="GPU-1a", free_bytes=20480 * 2**20)]
