"""Where to cut a chain of layers over a chain of devices, by dynamic programming.

State: the layers placed so far, and the memory used in each pool that several devices share. A state is dropped when
another at the same layer is no worse in cost and in every pool. Most plans don't touch a pool's limit: those are found
without that second part, exactly. Where they do, at most `_MAX_FRONT` states are kept at a layer, which is exact for
small models and a good heuristic for many unequal layers on many devices that share memory.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from devices.device import Device
from planner.profile import ModelProfile

Span = tuple[int, int]
Cost = tuple[int, float]
Memory = Callable[[Device, int, int], int]

_MAX_FRONT = 64
_MAX_COMPARED = 600
_BUCKETS = 16


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

    `shares` are bytes of weights that a decode step reads on the device itself. Minimises Σ ((work − share) / whole)²,
    where the whole is the model's work on that device: with equal layers and ample memory that is the method of
    largest remainders, each device within one layer of its share. `use_all` puts the number of devices used before
    that.
    `memory(device, first, last)` never shrinks as a span grows.
    """
    counts = Counter(device.memory_pool for device in devices)
    shared = tuple(pool for pool, count in counts.items() if count > 1)
    limits = {pool: min(device.total_bytes for device in devices if device.memory_pool == pool) for pool in shared}
    spans = _search(profile, devices, shares, memory, {}, use_all)
    if spans is None or _within(limits, devices, spans, memory):
        return spans
    return _search(profile, devices, shares, memory, limits, use_all)


def _search(
    profile: ModelProfile,
    devices: Sequence[Device],
    shares: Sequence[float],
    memory: Memory,
    limits: Mapping[str, int],
    use_all: bool,
) -> tuple[Span | None, ...] | None:
    """The best spans that keep each pool in `limits` within its bytes."""
    pools = tuple(limits)
    ends = (*profile.legal_cuts, profile.num_layers)
    fronts: dict[int, list[_Path]] = {0: [_Path((0, 0.0), (0,) * len(pools), ())]}
    for device, share in zip(devices, shares, strict=True):
        kind = device.backend, device.compute_dtype
        whole = profile.work_bytes(0, profile.num_layers, *kind)
        pool = pools.index(device.memory_pool) if device.memory_pool in pools else None
        reached: dict[int, list[_Path]] = defaultdict(list)
        for cut, paths in fronts.items():
            for path in paths:
                skipped = (path.cost[0] + use_all, path.cost[1] + (share / whole) ** 2)
                reached[cut].append(_Path(skipped, path.used, (*path.spans, None)))
            for end in (end for end in ends if end > cut):
                needed = memory(device, cut, end)
                if needed > device.free_bytes:
                    break
                error = ((profile.work_bytes(cut, end, *kind) - share) / whole) ** 2
                for path in paths:
                    used = path.used
                    if pool is not None:
                        if used[pool] + needed > limits[device.memory_pool]:
                            continue
                        used = (*used[:pool], used[pool] + needed, *used[pool + 1 :])
                    reached[end].append(_Path((path.cost[0], path.cost[1] + error), used, (*path.spans, (cut, end))))
        fronts = {cut: _thinned(_undominated(_bucketed(paths, limits))) for cut, paths in reached.items()}
    complete = fronts.get(profile.num_layers)
    return min(complete, key=lambda path: path.cost).spans if complete else None


def _within(limits: Mapping[str, int], devices: Sequence[Device], spans: Sequence[Span | None], memory: Memory) -> bool:
    used: Counter[str] = Counter()
    for device, span in zip(devices, spans, strict=True):
        if span is not None:
            used[device.memory_pool] += memory(device, *span)
    return all(used[pool] <= limit for pool, limit in limits.items())


def _bucketed(paths: list[_Path], limits: Mapping[str, int]) -> list[_Path]:
    """Where there are too many to compare with each other: the cheapest of those that use about the same memory, and
    the thriftiest in each pool."""
    if len(paths) <= _MAX_COMPARED or not limits:
        return paths
    grains = [max(1, limit // _BUCKETS) for limit in limits.values()]
    cheapest: dict[tuple[int, ...], _Path] = {}
    for path in paths:
        bucket = tuple(used // grain for used, grain in zip(path.used, grains, strict=True))
        if bucket not in cheapest or path.cost < cheapest[bucket].cost:
            cheapest[bucket] = path
    thriftiest = [min(paths, key=lambda path: (path.used[pool], path.cost)) for pool in range(len(grains))]
    return [*cheapest.values(), *thriftiest]


def _undominated(paths: list[_Path]) -> list[_Path]:
    kept: list[_Path] = []
    for path in sorted(paths, key=lambda path: (path.cost, path.used)):
        if not any(all(a <= b for a, b in zip(other.used, path.used, strict=True)) for other in kept):
            kept.append(path)
            if not path.used:
                break
    return kept


def _thinned(front: list[_Path]) -> list[_Path]:
    """At most `_MAX_FRONT` of a front sorted by cost: the thriftiest in each pool, and the rest evenly spread."""
    if len(front) <= _MAX_FRONT:
        return front
    thriftiest = [min(front, key=lambda path: (path.used[pool], path.cost)) for pool in range(len(front[0].used))]
    step = len(front) / (_MAX_FRONT - len(thriftiest))
    spread = [front[int(i * step)] for i in range(_MAX_FRONT - len(thriftiest))]
    return sorted({id(path): path for path in (*thriftiest, *spread)}.values(), key=lambda path: (path.cost, path.used))
