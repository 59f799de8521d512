"""A split places layers by a simple rule, or as the user says by hand, and checks them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from devices.hardware.device import Device
from planner.cost import Assignment, CostModel, PlacedStage, pool_bytes
from planner.memory import QUANTIZE_OPTION, ModelProfile, smaller_forms
from planner.options import LayerCounts
from transport.errors import ConfigError, DoesNotFit

LayerRange = tuple[int, int]
SplitCost = tuple[int, float]
MemoryFunction = Callable[[Device, int, int], int]

_MAX_FRONT = 64
_MAX_COMPARED = 600
_BUCKETS = 16


@dataclass(frozen=True, slots=True)
class _Path:
    """A partial assignment: `spans` has one for each device so far, None where it is skipped."""

    cost: SplitCost
    used: tuple[int, ...]
    spans: tuple[LayerRange | None, ...]


def best_spans(
    profile: ModelProfile, devices: Sequence[Device], shares: Sequence[float], memory: MemoryFunction, *, use_all: bool
) -> tuple[LayerRange | None, ...] | None:
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
    if spans is None or _prune_by_memory(limits, devices, spans, memory):
        return spans
    return _search(profile, devices, shares, memory, limits, use_all)


def _search(
    profile: ModelProfile,
    devices: Sequence[Device],
    shares: Sequence[float],
    memory: MemoryFunction,
    limits: Mapping[str, int],
    use_all: bool,
) -> tuple[LayerRange | None, ...] | None:
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


def _prune_by_memory(
    limits: Mapping[str, int], devices: Sequence[Device], spans: Sequence[LayerRange | None], memory: MemoryFunction
) -> bool:
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


Rule = Literal["proportional", "memory", "even"]


def follow_rule(costs: CostModel, rule: Rule, *, use_all: bool) -> Assignment | None:
    """None if no cut fits. A device whose share rounds to no layer is left out unless `use_all`.

    proportional: to decode steps a second, from bandwidth and what the weights take on the device. memory: to free
    memory, as exo and others do. even: as many layers each.
    """
    devices = [times.device for times in costs.pool.devices]
    profile = costs.profile
    works = [profile.work_bytes(0, profile.num_layers, device.backend, device.compute_dtype) for device in devices]
    if rule == "proportional":
        parts = [device.bandwidth_bytes_per_s / work for device, work in zip(devices, works, strict=True)]
    else:
        parts = [float(device.free_bytes) if rule == "memory" else 1.0 for device in devices]
    shares = [work * part / sum(parts) for work, part in zip(works, parts, strict=True)]
    spans = best_spans(costs.profile, devices, shares, costs.memory_model.memory_bytes, use_all=use_all)
    if spans is None:
        return None
    return tuple(PlacedStage(number, *span) for number, span in enumerate(spans) if span is not None)


_GIB = 2**30


def place_by_hand(costs: CostModel, counts: LayerCounts) -> Assignment:
    """Raises ConfigError for counts that contradict the model or the pool, DoesNotFit where memory does not suffice."""
    names = [times.device.name for times in costs.pool.devices]
    profile = costs.profile
    for name, _ in counts:
        if name not in names:
            raise ConfigError(f"--layers names {name}, which is not in the pool", hint=f"it has: {', '.join(names)}")
    total = sum(count for _, count in counts)
    if total != profile.num_layers:
        raise ConfigError(
            f"--layers places {total} layers; {profile.name} has {profile.num_layers}",
            hint=f"{abs(profile.num_layers - total)} too {'many' if total > profile.num_layers else 'few'}",
        )
    placed: list[PlacedStage] = []
    first = 0
    for name, count in counts:
        placed.append(PlacedStage(names.index(name), first, first + count))
        first += count
        if first < profile.num_layers and first not in profile.legal_cuts:
            raise ConfigError(
                f"{profile.name} can't be cut after {first} layers: those around it share state",
                hint=f"it can be cut after: {', '.join(map(str, profile.legal_cuts)) or 'none'}",
            )
    _check_memory(costs, placed)
    _check_links(costs, placed)
    return tuple(placed)


def _check_memory(costs: CostModel, placed: Sequence[PlacedStage]) -> None:
    """Raises DoesNotFit for the first of `_memory_excess`."""
    for name, needed, have in _memory_excess(costs, placed):
        hint = "give it fewer layers, lower --context or the number of conversations"
        for form in smaller_forms(costs.profile):
            if not any(_memory_excess(CostModel(form, costs.pool, costs.workload, costs.wire_dtype), placed)):
                hint = f"--quantize {QUANTIZE_OPTION[form.weights]} would fit; or {hint}"
                break
        raise DoesNotFit(
            f"{name}: these layers need {needed / _GIB:.2f} GiB, {(needed - have) / _GIB:.2f} GiB more than the "
            f"{have / _GIB:.2f} GiB there are",
            hint=hint,
        )


def _memory_excess(costs: CostModel, placed: Sequence[PlacedStage]) -> Iterator[tuple[str, int, int]]:
    """Who would need more memory than there is: name, bytes needed, bytes there."""
    for stage in placed:
        needed = costs.memory_bytes(stage.device, stage.first, stage.last)
        if needed > costs.free_bytes(stage.device):
            yield costs.name(stage.device), needed, costs.free_bytes(stage.device)
    used = pool_bytes(costs, tuple(placed))
    for pool, total in costs.pool_total_bytes.items():
        if used[pool] > total:
            members = [costs.name(stage.device) for stage in placed if costs.pool_of[stage.device] == pool]
            yield f"{' and '.join(members)} together", used[pool], total


def _check_links(costs: CostModel, placed: Sequence[PlacedStage]) -> None:
    devices = [stage.device for stage in placed]
    for source, target in zip([None, *devices], [*devices, None], strict=True):
        if costs.link(source, target) is None:
            raise ConfigError(
                f"no link from {costs.host(source)} to {costs.host(target)} was measured",
                hint="choose another order of devices in --layers",
            )
