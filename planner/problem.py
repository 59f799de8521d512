"""A search problem is the pool as arrays: limits, classes of interchangeable devices, costs of spans."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from planner.cost import CostModel, FloatArray, StageSeconds


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchLimits:
    """`devices` may be used, `required` ones must be; each within `free_bytes` (by device number).

    `num_used` bounds (at least, at most) how many devices of a memory pool are used. `forbidden` hops go between two
    devices.
    """

    devices: tuple[int, ...]
    free_bytes: Mapping[int, int]
    required: frozenset[int] = frozenset()
    num_used: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    forbidden: frozenset[tuple[int, int]] = frozenset()

    def at_least(self, pool: str) -> int:
        return max(1, self.num_used[pool][0]) if pool in self.num_used else 1

    def with_free_bytes(self, device: int, num_bytes: int) -> SearchLimits:
        return replace(self, free_bytes={**self.free_bytes, device: min(num_bytes, self.free_bytes[device])})

    def with_num_used(self, pool: str, least: int, most: int) -> SearchLimits:
        before = self.num_used.get(pool, (0, most))
        return replace(self, num_used={**self.num_used, pool: (max(before[0], least), min(before[1], most))})

    def without_devices(self, devices: set[int]) -> SearchLimits:
        return replace(self, devices=tuple(device for device in self.devices if device not in devices))

    def without_hop(self, source: int, target: int) -> SearchLimits:
        return replace(self, forbidden=self.forbidden | {(source, target)})


def whole_pool(costs: CostModel, required: frozenset[int] = frozenset()) -> SearchLimits:
    devices = tuple(range(len(costs.pool.devices)))
    return SearchLimits(
        devices=devices, free_bytes={device: costs.free_bytes(device) for device in devices}, required=required
    )


def hop_matrix(costs: CostModel, limits: SearchLimits, tokens: int) -> FloatArray:
    """hop[i, j] seconds between the i-th and j-th of the limits' devices; the last row and column are the engine."""
    ends: list[int | None] = [*limits.devices, None]
    hops = np.array([[costs.hop_s(source, target, tokens) for target in ends] for source in ends])
    place = {device: index for index, device in enumerate(limits.devices)}
    for source, target in limits.forbidden:
        if source in place and target in place:
            hops[place[source], place[target]] = np.inf
    return hops


def device_classes(costs: CostModel, limits: SearchLimits) -> tuple[tuple[int, ...], ...]:
    """The limits' devices in classes: swapping two of a class changes neither times, memory nor links."""
    hops = hop_matrix(costs, limits, 1)
    place = {device: index for index, device in enumerate(limits.devices)}
    by_likeness: dict[object, list[list[int]]] = defaultdict(list)
    on_host = Counter(costs.host(device) for device in limits.devices)
    for device in limits.devices:
        classes = by_likeness[_equivalence_key(costs, limits, device, on_host)]
        for members in classes:
            if all(_swappable(hops, place[device], place[member]) for member in members):
                members.append(device)
                break
        else:
            classes.append([device])
    found = [tuple(members) for classes in by_likeness.values() for members in classes]
    return tuple(sorted(found))


def _equivalence_key(costs: CostModel, limits: SearchLimits, device: int, on_host: Counter[str]) -> object:
    times = costs.pool.devices[device]
    pool, host = costs.pool_of[device], costs.host(device)
    is_alone = on_host[host] == 1 and not any(host in pair for pairs in costs.pool.shared_links for pair in pairs)
    return (
        (times.kinds, times.layers, times.embed, times.head, times.step_s, times.busy),
        (times.device.compute_dtype, limits.free_bytes[device], device in limits.required),
        None if costs.pool_sizes[pool] == 1 else pool,
        None if is_alone else host,
    )


def _swappable(hops: FloatArray, one: int, other: int) -> bool:
    order = np.arange(len(hops))
    order[[one, other]] = other, one
    return bool(np.array_equal(hops[np.ix_(order, order)], hops))


IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanCosts:
    """One class's layers at the boundaries (0, the legal cuts, the end): what a span costs is a difference.

    `cost` and `load` end with the head and start without the embedding; every span also takes the `step`. A span that
    ends at boundary j and does not start at 0 fits memory from boundary `lowest[j]` on; one from 0 fits up to
    boundary `first_last`.
    """

    cost: FloatArray
    cost_first: float
    cost_step: float
    load: FloatArray
    load_first: float
    load_step: float
    lowest: IntArray
    first_last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchProblem:
    """Minimise Σ cost + Σ hops over rings, with no load above a cap. The last of `hops` is the engine.

    `group` is the sequences of a step, `transfers` the seconds that a hop loads its link, `members` the devices of
    each class. A ring has at least `least[i]` of class i, and of the classes in each of `pools` together between two
    bounds.
    """

    boundaries: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]
    spans: tuple[SpanCosts, ...]
    hops: FloatArray
    transfers: FloatArray
    least: tuple[int, ...]
    pools: tuple[tuple[tuple[int, ...], int, int], ...]
    group: int

    @property
    def num_states(self) -> int:
        return int(np.prod([len(members) + 1 for members in self.members], dtype=np.float64))


def build_problem(costs: CostModel, limits: SearchLimits, group: int, *, one_chat: bool) -> SearchProblem:
    """`one_chat`: a token alone in the ring, for `latency`; else among the workload's others."""
    boundaries = (0, *costs.profile.legal_cuts, costs.profile.num_layers)
    members = device_classes(costs, limits)
    heads = [each[0] for each in members]
    place = {device: index for index, device in enumerate(limits.devices)}
    full = hop_matrix(costs, limits, group) if one_chat else _trip_hops(costs, limits, group)
    first = [place[head] for head in heads]
    hops = full[np.ix_([*first, -1], [*first, -1])]
    for index, each in enumerate(members):
        hops[index, index] = full[place[each[0]], place[each[1]]] if len(each) > 1 else np.inf
    return SearchProblem(
        boundaries=boundaries,
        members=members,
        spans=tuple(_spans(costs, limits, head, boundaries, group, one_chat=one_chat) for head in heads),
        hops=hops,
        transfers=_transfers(costs, members, group),
        least=tuple(sum(device in limits.required for device in each) for each in members),
        pools=tuple(
            (tuple(i for i, head in enumerate(heads) if costs.pool_of[head] == pool), least, most)
            for pool, (least, most) in limits.num_used.items()
        ),
        group=group,
    )


def _trip_hops(costs: CostModel, limits: SearchLimits, group: int) -> FloatArray:
    ends: list[int | None] = [*limits.devices, None]
    allowed = hop_matrix(costs, limits, 1) < np.inf
    hops = np.array([[costs.trip_hop_s(source, target, group) for target in ends] for source in ends])
    return np.where(allowed, hops, np.inf)


def _transfers(costs: CostModel, members: tuple[tuple[int, ...], ...], group: int) -> FloatArray:
    def seconds(source: tuple[int, ...], target: tuple[int, ...]) -> float:
        other = target[0] if source is not target else target[-1]
        return costs.load_transfer_s(source[0], other, group)

    return np.array([[seconds(source, target) for target in members] for source in members])


def _spans(
    costs: CostModel, limits: SearchLimits, device: int, boundaries: tuple[int, ...], group: int, *, one_chat: bool
) -> SpanCosts:
    if one_chat:
        cost = load = costs.decode(device, group)
        factor = 1.0
    else:
        cost, load = costs.trip_seconds(device, group), costs.load_seconds(device, group)
        is_busy = costs.workload.concurrency > 1
        factor = costs.busy_factor(device, limits.at_least(costs.pool_of[device])) if is_busy else 1.0
    lowest, first_last = _memory_window(costs, device, boundaries, limits.free_bytes[device])
    return SpanCosts(
        cost=factor * _at(cost, boundaries),
        cost_first=factor * cost.embed_s,
        cost_step=factor * cost.step_s,
        load=factor * _at(load, boundaries),
        load_first=factor * load.embed_s,
        load_step=factor * load.step_s,
        lowest=lowest,
        first_last=first_last,
    )


def _at(seconds: StageSeconds, boundaries: tuple[int, ...]) -> FloatArray:
    ends: FloatArray = seconds.cumulative_s[list(boundaries)]
    ends[-1] += seconds.head_s
    return ends


def _memory_window(costs: CostModel, device: int, boundaries: tuple[int, ...], free_bytes: int) -> tuple[IntArray, int]:
    """Memory never shrinks as a span grows, so each end has a lowest start."""
    count = len(boundaries)
    lowest = np.zeros(count, dtype=np.int64)
    low = 1
    for high in range(count):
        while low < high and costs.memory_bytes(device, boundaries[low], boundaries[high]) > free_bytes:
            low += 1
        lowest[high] = low
    first_last = 0
    while first_last + 1 < count and costs.memory_bytes(device, 0, boundaries[first_last + 1]) <= free_bytes:
        first_last += 1
    return lowest, first_last
