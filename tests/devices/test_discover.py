"""Device strings, their requests, and nvidia-smi's output."""

from __future__ import annotations

import pytest

from devices import discover
from devices.discover import default_devices, device_requests, parse_device
from devices.nvidia import Gpu, parse_gpus
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


def test_names_are_unique_and_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discover, "_num_cores", lambda: 8)
    monkeypatch.setattr(discover, "_is_apple_silicon", lambda: False)
    requests = device_requests(["torch:cpu", "mlx", "cpu", "cuda:0"])
    assert [request.name for request in requests] == ["cpu-1", "mlx", "cpu-2", "cuda:0"]
    assert [request.threads for request in requests] == [2, 2, 2, 1]
    capped = device_requests(["cpu"], threads=3, memory_bytes=5)[0]
    assert (capped.name, capped.threads, capped.memory_bytes) == ("cpu", 3, 5)


def test_a_gpu_is_named_once() -> None:
    with pytest.raises(ConfigError, match="cuda:0"):
        device_requests(["cuda", "torch:cuda:0"])


@pytest.mark.parametrize(
    ("num_gpus", "apple", "wanted"), [(2, False, ["cuda:0", "cuda:1"]), (0, True, ["mlx"]), (0, False, ["torch:cpu"])]
)
def test_defaults(num_gpus: int, apple: bool, wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx.core")
    monkeypatch.setattr(discover, "num_visible_gpus", lambda: num_gpus)
    monkeypatch.setattr(discover, "_is_apple_silicon", lambda: apple)
    assert default_devices() == wanted


def test_nvidia_smi_lines() -> None:
    text = "GPU-1a, 20480\nGPU-2b, [N/A]\nUnable to determine the device handle\n"
    assert parse_gpus(text) == [Gpu(uuid="GPU-1a", free_bytes=20480 * 2**20)]
