"""What an assignment of layers to devices would do: the one place that predictions and objectives come from."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from planner.cost import CostModel

Objective = Literal["latency", "throughput", "auto"]


@dataclass(frozen=True, slots=True)
class Placed:
    """Layers [first, last) on device number `device` of the pool."""

    device: int
    first: int
    last: int


Assignment = tuple[Placed, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """`decode_s` and `hops_s` (one more than stages, the last one back to the engine) are of one chat's token.

    `tokens_per_s` are decode rates, without prompts: of one chat, and of `concurrency` chats in `num_groups` groups of
    `group_size`. `workload_tokens_per_s` counts the time of prompts too. `limit` names what bounds many chats.
    """

    decode_s: tuple[float, ...]
    hops_s: tuple[float, ...]
    token_s: float
    tokens_per_s: float
    concurrency: int
    group_size: int
    num_groups: int
    tokens_per_s_many: float
    workload_tokens_per_s: float
    prompt_tokens: int
    ttft_s: float
    limit: str


def objective_s(costs: CostModel, assignment: Assignment, objective: Objective) -> float:
    """Seconds a token: what the solvers minimise. Infinite where there is no link or memory does not suffice.

    latency: Σ stages + Σ hops of one chat. throughput: the load of the busiest resource, by sequences of a group.
    auto: the larger of throughput's and the time of a token's whole trip, divided among the chats.
    Loads and trips count the workload's prompts, by token of the answer.
    """
    if not fits(costs, assignment):
        return float("inf")
    if objective == "latency":
        return trip_s(costs, assignment, 1)
    busiest_s = max(resource_loads(costs, assignment).values()) / costs.workload.group_size(len(assignment))
    if objective == "throughput":
        return busiest_s if trip_s(costs, assignment, 1) < float("inf") else float("inf")
    return max(loaded_trip_s(costs, assignment) / costs.workload.concurrency, busiest_s)


def fits(costs: CostModel, assignment: Assignment) -> bool:
    """Within each device's memory and each shared pool's."""
    used = pool_bytes(costs, assignment)
    return all(used[key] <= costs.pool_total_bytes[key] for key in used) and all(
        costs.memory_bytes(placed.device, placed.first, placed.last) <= costs.free_bytes(placed.device)
        for placed in assignment
    )


def pool_bytes(costs: CostModel, assignment: Assignment) -> Counter[str]:
    used: Counter[str] = Counter()
    for placed in assignment:
        used[costs.pool_of[placed.device]] += costs.memory_bytes(placed.device, placed.first, placed.last)
    return used


def hops_s(costs: CostModel, assignment: Assignment, tokens: int) -> tuple[float, ...]:
    """Engine → stage 0 → … → last stage → engine."""
    return tuple(costs.hop_s(source, target, tokens) for source, target in _hops(assignment))


def trip_s(costs: CostModel, assignment: Assignment, group: int) -> float:
    """T₁(b): one decode step of `group` sequences, alone in the ring."""
    stages_s = sum(costs.decode(placed.device, group).span_s(placed.first, placed.last) for placed in assignment)
    return stages_s + sum(hops_s(costs, assignment, group))


def loaded_trip_s(costs: CostModel, assignment: Assignment) -> float:
    """A decode step's trip among the workload's others, and one prompt's prefill by token of its answer."""
    work, busy = costs.workload, costs.workload.concurrency > 1
    group = work.group_size(len(assignment))
    total = sum(
        factor * costs.trip_seconds(placed.device, group).span_s(placed.first, placed.last)
        for placed, factor in zip(assignment, factors(costs, assignment, busy=busy), strict=True)
    )
    return total + sum(costs.trip_hop_s(source, target, group) for source, target in _hops(assignment))


def resource_loads(costs: CostModel, assignment: Assignment) -> dict[str, float]:
    """Seconds that each resource works for a group's decode step and its part of the prompts, by name."""
    work, busy = costs.workload, costs.workload.concurrency > 1
    group = work.group_size(len(assignment))
    loads: dict[str, float] = {}
    for placed, factor in zip(assignment, factors(costs, assignment, busy=busy), strict=True):
        seconds = costs.load_seconds(placed.device, group).span_s(placed.first, placed.last)
        loads[costs.name(placed.device)] = factor * seconds
    links: dict[tuple[str, str], float] = defaultdict(float)
    for source, target in _hops(assignment)[1:-1]:
        pair = costs.host(source), costs.host(target)
        links[pair] += costs.load_transfer_s(source, target, group)
    for (source_host, target_host), seconds in links.items():
        loads[f"the link {source_host} → {target_host}"] = seconds
    for shared in costs.pool.shared_links:
        together = sum(links[pair] for pair in set(shared) if pair in links)
        if together:
            loads["the medium of " + ", ".join(f"{a} → {b}" for a, b in shared)] = together
    return loads


def factors(costs: CostModel, assignment: Assignment, *, busy: bool) -> list[float]:
    """How much slower each stage's device is while the others of its memory pool that are used work as well."""
    if not busy:
        return [1.0] * len(assignment)
    used = Counter(costs.pool_of[placed.device] for placed in assignment)
    return [costs.busy_factor(placed.device, used[costs.pool_of[placed.device]]) for placed in assignment]


def ttft_s(costs: CostModel, assignment: Assignment) -> float:
    """The first token of the workload's prompt in an idle ring: chunks follow each other through the stages.

    With equal chunks Σ c + (m − 1)·max c. As many are on their way as there are stages.
    """
    chunks = costs.workload.chunks(busy=False)
    returned: list[float] = []
    free_at = [0.0] * len(assignment)
    for number, (tokens, before) in enumerate(chunks):
        is_last = number == len(chunks) - 1
        now = returned[number - len(assignment)] if number >= len(assignment) else 0.0
        hops = hops_s(costs, assignment, tokens)
        for stage, placed in enumerate(assignment):
            begin = max(now + hops[stage], free_at[stage])
            seconds = costs.chunk(placed.device, tokens, before, is_last=is_last).span_s(placed.first, placed.last)
            now = free_at[stage] = begin + seconds
        returned.append(now + hops[-1])
    return returned[-1]


def predict(costs: CostModel, assignment: Assignment) -> Prediction:
    work, num_stages = costs.workload, len(assignment)
    group, groups = work.group_size(num_stages), work.num_groups(num_stages)
    token_s = trip_s(costs, assignment, 1)
    slow = factors(costs, assignment, busy=groups > 1)
    stages_s = [
        factor * costs.decode(placed.device, group).span_s(placed.first, placed.last)
        for placed, factor in zip(assignment, slow, strict=True)
    ]
    cycle_s = max(sum(stages_s) + sum(hops_s(costs, assignment, group)), groups * max(stages_s))
    loads = resource_loads(costs, assignment)
    busiest = max(loads, key=loads.__getitem__)
    names = {costs.name(placed.device) for placed in assignment}
    limit = f"the speed of {busiest}" if busiest in names else busiest
    trip_each_s = loaded_trip_s(costs, assignment) / work.concurrency
    return Prediction(
        decode_s=tuple(costs.decode(placed.device, 1).span_s(placed.first, placed.last) for placed in assignment),
        hops_s=hops_s(costs, assignment, 1),
        token_s=token_s,
        tokens_per_s=1 / token_s,
        concurrency=work.concurrency,
        group_size=group,
        num_groups=groups,
        tokens_per_s_many=work.concurrency / cycle_s,
        workload_tokens_per_s=1 / max(trip_each_s, loads[busiest] / group),
        prompt_tokens=work.prompt_tokens,
        ttft_s=ttft_s(costs, assignment),
        limit=limit if loads[busiest] / group >= trip_each_s else "the time of a whole trip through the ring",
    )


def _hops(assignment: Assignment) -> Sequence[tuple[int | None, int | None]]:
    devices = [placed.device for placed in assignment]
    return list(zip([None, *devices], [*devices, None], strict=True))
