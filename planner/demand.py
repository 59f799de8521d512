"""Memory: what a stage takes, and what the devices of a pool may take together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from devices.device import Device
from planner.profile import ModelProfile

CPU_RESERVE_BYTES = 384 * 2**20
_OTHER_RESERVE_BYTES = 512 * 2**20

HEAD_RESERVE_BYTES = 256 * 2**20
"""On the head's host: the engine (124 MB with a tokenizer of 49,000 tokens, more with a larger one) and the endpoint,
which come after its memory was looked at."""


def runtime_reserve_bytes(device: Device) -> int:
    """For each worker: its interpreter and libraries, and a step's activations. Measured for torch's CPU backend
    (decision 0007); others get more until they are measured too."""
    return CPU_RESERVE_BYTES if (device.backend, device.kind) == ("torch", "cpu") else _OTHER_RESERVE_BYTES


@dataclass(frozen=True, slots=True)
class Demand:
    """What the ring must hold: weights, KV for `concurrency` sequences of `context_tokens`, a reserve each worker."""

    profile: ModelProfile
    context_tokens: int
    concurrency: int

    def weights_bytes(self, device: Device, first: int, last: int) -> int:
        return self.profile.weights_bytes(first, last, device.backend, device.compute_dtype)

    def kv_bytes(self, device: Device, first: int, last: int) -> int:
        return self.profile.kv_bytes(first, last, self.context_tokens, self.concurrency, device.compute_dtype)

    def memory_bytes(self, device: Device, first: int, last: int) -> int:
        """Never shrinks as [first, last) grows."""
        return (
            self.weights_bytes(device, first, last) + self.kv_bytes(device, first, last) + runtime_reserve_bytes(device)
        )


def pool_totals(devices: Iterable[Device]) -> dict[str, int]:
    """The most that the devices of each pool may take together."""
    totals: dict[str, int] = {}
    for device in devices:
        key = device.memory_pool
        totals[key] = min(totals.get(key, device.total_bytes), device.total_bytes)
    return totals


def available_bytes(devices: Sequence[Device]) -> int:
    free: dict[str, int] = defaultdict(int)
    for device in devices:
        free[device.memory_pool] += device.free_bytes
    totals = pool_totals(devices)
    return sum(min(num_bytes, totals[key]) for key, num_bytes in free.items())
