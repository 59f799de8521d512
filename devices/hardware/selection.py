"""The selection says which devices a host offers by default and what a user's --device strings mean."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Sequence

import psutil

from devices.hardware.device import Backend, DeviceRequest
from devices.hardware.memory import num_visible_gpus
from transport.errors import ConfigError

_TORCH_DEVICE = re.compile(r"(?:torch:)?(cpu|mps|cuda(?::\d+)?)")


def default_devices() -> list[str]:
    """Every GPU of this host, or else its CPU.

    A CPU beside a GPU is slower by far and is what its owner works with: it takes part when asked for.
    """
    num_gpus = num_visible_gpus()
    if num_gpus:
        return [f"cuda:{index}" for index in range(num_gpus)]
    if _is_apple_silicon():
        return ["mlx"] if importlib.util.find_spec("mlx") else ["mps"]
    return ["torch:cpu"]


def parse_device(text: str) -> tuple[Backend, str]:
    """ "torch:cpu", "cpu", "cuda", "torch:cuda:1", "mps", "mlx" → backend and the device as it addresses it.

    Raises ConfigError for anything else.
    """
    name = text.strip().lower()
    if name == "mlx":  # It has one device, and chooses it itself.
        return "mlx", "mlx"
    match = _TORCH_DEVICE.fullmatch(name)
    if match is None:
        raise ConfigError(f"{text!r} is not a device", hint="write torch:cpu, cuda:0, mps or mlx")
    return "torch", "cuda:0" if match[1] == "cuda" else match[1]


def device_requests(
    texts: Sequence[str],
    *,
    threads: int | None = None,
    cores_allowed: float | None = None,
    memory_bytes: int | None = None,
) -> list[DeviceRequest]:
    """Requests with unique names ("cpu-1", "cpu-2" where there are two); `memory_bytes` caps each.

    The devices that compute on the CPU share `threads` equally, at least one each; others need one to be driven.
    Without `threads` they share the physical cores, or the `cores_allowed` by a control group if that is less.
    Raises ConfigError for a string that is no device, for more threads than there are CPUs, or a GPU named twice: two
    workers would only get in each other's way there, while two CPU workers can have cores of their own.
    """
    parsed = [parse_device(text) for text in texts]
    counts = Counter(kind for _, kind in parsed)
    for kind, count in counts.items():
        if count > 1 and not _uses_cpu(kind):
            raise ConfigError(f"the device {kind} is named {count} times", hint="name each GPU once")
    num_on_cpu = sum(_uses_cpu(kind) for _, kind in parsed)
    if threads is None:
        threads = _default_threads(cores_allowed)
    elif threads > num_cpus():
        raise ConfigError(
            f"{threads} threads were asked for; this host has {num_cpus()} CPUs for Potluck",
            hint=f"use --threads with 1 to {num_cpus()}, or leave it out",
        )
    share = max(1, threads // max(1, num_on_cpu))
    seen: Counter[str] = Counter()
    requests = []
    for backend, kind in parsed:
        seen[kind] += 1
        requests.append(
            DeviceRequest(
                name=kind if counts[kind] == 1 else f"{kind}-{seen[kind]}",
                backend=backend,
                kind=kind,
                threads=share if _uses_cpu(kind) else 1,
                memory_bytes=memory_bytes,
            )
        )
    return requests


def _uses_cpu(kind: str) -> bool:
    return kind == "cpu" or (kind == "mlx" and not _is_apple_silicon())


def _is_apple_silicon() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def num_cpus() -> int:
    """CPUs that this process may use, hyperthreads included: a container or taskset may allow fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _default_threads(cores_allowed: float | None) -> int:
    """A thread for each physical core: two that share one only wait for each other."""
    cores = min(psutil.cpu_count(logical=False) or num_cpus(), num_cpus())
    return cores if cores_allowed is None else max(1, min(cores, int(cores_allowed)))
