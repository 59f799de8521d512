"""A search as arrays: for each class of devices what its layers cost and load it, and which spans fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.cost import CostModel, Floats, StageSeconds
from planner.limits import SearchLimits
from planner.symmetry import classes_of, hop_matrix

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """One class's layers at the boundaries (0, the legal cuts, the end): what a span costs is a difference.

    `cost` and `load` end with the head and start without the embedding; every span also takes the `step`. A span that
    ends at boundary j and does not start at 0 fits memory from boundary `lowest[j]` on; one from 0 fits up to
    boundary `first_last`.
    """

    cost: Floats
    cost_first: float
    cost_step: float
    load: Floats
    load_first: float
    load_step: float
    lowest: Ints
    first_last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Minimise Σ cost + Σ hops over rings, with no load above a cap. The last of `hops` is the engine.

    `group` is the sequences of a step, `transfers` the seconds that a hop loads its link, `members` the devices of
    each class. A ring has at least `least[i]` of class i, and of the classes in each of `pools` together between two
    bounds.
    """

    boundaries: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]
    spans: tuple[Spans, ...]
    hops: Floats
    transfers: Floats
    least: tuple[int, ...]
    pools: tuple[tuple[tuple[int, ...], int, int], ...]
    group: int

    @property
    def num_states(self) -> int:
        return int(np.prod([len(members) + 1 for members in self.members], dtype=np.float64))


def problem_of(costs: CostModel, limits: SearchLimits, group: int, *, one_chat: bool) -> Problem:
    """`one_chat`: a token alone in the ring, for `latency`; else among the workload's others."""
    boundaries = (0, *costs.profile.legal_cuts, costs.profile.num_layers)
    members = classes_of(costs, limits)
    heads = [each[0] for each in members]
    place = {device: index for index, device in enumerate(limits.devices)}
    full = hop_matrix(costs, limits, group) if one_chat else _trip_hops(costs, limits, group)
    first = [place[head] for head in heads]
    hops = full[np.ix_([*first, -1], [*first, -1])]
    for index, each in enumerate(members):
        hops[index, index] = full[place[each[0]], place[each[1]]] if len(each) > 1 else np.inf
    return Problem(
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


def _trip_hops(costs: CostModel, limits: SearchLimits, group: int) -> Floats:
    ends: list[int | None] = [*limits.devices, None]
    allowed = hop_matrix(costs, limits, 1) < np.inf
    hops = np.array([[costs.trip_hop_s(source, target, group) for target in ends] for source in ends])
    return np.where(allowed, hops, np.inf)


def _transfers(costs: CostModel, members: tuple[tuple[int, ...], ...], group: int) -> Floats:
    def seconds(source: tuple[int, ...], target: tuple[int, ...]) -> float:
        other = target[0] if source is not target else target[-1]
        return costs.load_transfer_s(source[0], other, group)

    return np.array([[seconds(source, target) for target in members] for source in members])


def _spans(
    costs: CostModel, limits: SearchLimits, device: int, boundaries: tuple[int, ...], group: int, *, one_chat: bool
) -> Spans:
    if one_chat:
        cost = load = costs.decode(device, group)
        factor = 1.0
    else:
        cost, load = costs.trip_seconds(device, group), costs.load_seconds(device, group)
        is_busy = costs.workload.concurrency > 1
        factor = costs.busy_factor(device, limits.at_least(costs.pool_of[device])) if is_busy else 1.0
    lowest, first_last = _memory_window(costs, device, boundaries, limits.free_bytes[device])
    return Spans(
        cost=factor * _at(cost, boundaries),
        cost_first=factor * cost.embed_s,
        cost_step=factor * cost.step_s,
        load=factor * _at(load, boundaries),
        load_first=factor * load.embed_s,
        load_step=factor * load.step_s,
        lowest=lowest,
        first_last=first_last,
    )


def _at(seconds: StageSeconds, boundaries: tuple[int, ...]) -> Floats:
    ends: Floats = seconds.ends[list(boundaries)]
    ends[-1] += seconds.head_s
    return ends


def _memory_window(costs: CostModel, device: int, boundaries: tuple[int, ...], free_bytes: int) -> tuple[Ints, int]:
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
