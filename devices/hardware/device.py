"""A device as the planner sees it, and as a user requests it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transport.messages.ring import DType

Backend = Literal["torch", "mlx"]
HOST_MEMORY = "/ram"
"""How the memory pool of devices ends that compute in their host's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator or CPU, as measured.

    `kind` is the device as its backend addresses it: "cpu", "cuda:0", "mps" or "mlx". Devices that share memory have
    the same `memory_pool`: each may take `free_bytes` (after the owner's cap) if the others take little, and all of
    them together `total_bytes`, what was free in the pool. `bandwidth_bytes_per_s` is that of matrix-vector products
    in `compute_dtype`, measured while the host's other devices did the same.
    """

    name: str
    backend: Backend
    kind: str
    host: str
    threads: int
    free_bytes: int
    total_bytes: int
    bandwidth_bytes_per_s: float
    compute_dtype: DType
    memory_pool: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRequest:
    """A device to probe. `memory_bytes` is the owner's cap, None for all that is free."""

    name: str
    backend: Backend
    kind: str
    threads: int
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnavailableDevice:
    """A device that can't take part, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedDevices:
    """The devices of a host in the order asked for, without those that could not be measured."""

    devices: tuple[Device, ...]
    left_out: tuple[UnavailableDevice, ...]
