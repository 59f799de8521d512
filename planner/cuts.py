"""Where to cut a chain of layers over a chain of devices: exact, by dynamic programming.

State: the layers placed so far, and the memory used in each pool that several devices share. A state is dropped when
another at the same layer is no worse in cost and in every pool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from devices.device import Device
from planner.profile import ModelProfile

Span = tuple[int, int]
Cost = tuple[int, float]
Memory = Callable[[Device, int, int], int]


@dataclass(frozen=True, slots=True)
class _Path:
    """A partial assignment: `spans` has one for each device so far, None where it is skipped."""

    cost: Cost
    used: tuple[int, ...]
    spans: tuple[Span | None, ...]


def best_spans(
    profile: ModelProfile, devices: Sequence[Device], shares: Sequence[float], memory: Memory, *, use_all: bool
) -> tuple[Span | None, ...] | None:
    """The layers of each device, None for one that gets none; None if no assignment fits.

    Minimises Σ (work − share)² in parameters: with equal layers and ample memory that is the method of largest
    remainders, each device within one layer of its share. `use_all` puts the number of devices used before that.
    `memory(device, first, last)` never shrinks as a span grows.
    """
    counts = Counter(device.memory_pool for device in devices)
    pools = [pool for pool, count in counts.items() if count > 1]
    limits = tuple(min(d.total_bytes for d in devices if d.memory_pool == pool) for pool in pools)
    ends = (*profile.legal_cuts, profile.num_layers)
    fronts: dict[int, list[_Path]] = {0: [_Path((0, 0.0), (0,) * len(pools), ())]}
    for device, share in zip(devices, shares, strict=True):
        pool = pools.index(device.memory_pool) if device.memory_pool in pools else None
        reached: dict[int, list[_Path]] = {}
        for cut, paths in fronts.items():
            for path in paths:
                skipped = (path.cost[0] + use_all, path.cost[1] + share**2)
                reached.setdefault(cut, []).append(_Path(skipped, path.used, (*path.spans, None)))
            for end in (end for end in ends if end > cut):
                needed = memory(device, cut, end)
                if needed > device.free_bytes:
                    break
                error = (profile.work_params(cut, end) - share) ** 2
                for path in paths:
                    used = path.used if pool is None else _added(path.used, pool, needed)
                    if all(amount <= limit for amount, limit in zip(used, limits, strict=True)):
                        cost = (path.cost[0], path.cost[1] + error)
                        reached.setdefault(end, []).append(_Path(cost, used, (*path.spans, (cut, end))))
        fronts = {cut: _undominated(paths) for cut, paths in reached.items()}
    complete = fronts.get(profile.num_layers)
    return min(complete, key=lambda path: path.cost).spans if complete else None


def _added(used: tuple[int, ...], pool: int, amount: int) -> tuple[int, ...]:
    return (*used[:pool], used[pool] + amount, *used[pool + 1 :])


def _undominated(paths: list[_Path]) -> list[_Path]:
    kept: list[_Path] = []
    for path in sorted(paths, key=lambda path: (path.cost, path.used)):
        if not any(all(a <= b for a, b in zip(other.used, path.used, strict=True)) for other in kept):
            kept.append(path)
    return kept
