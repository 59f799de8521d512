"""The cost model predicts seconds of stages, hops and whole rings: every objective comes from here (decision 0005)."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from planner.measurements import DeviceTimes, LinkTimes, PoolTimes
from planner.memory import MemoryModel, ModelProfile, pool_totals
from planner.options import Workload
from transport.messages.measure import Grid
from transport.messages.ring import DTYPE_BYTES, DType


def seconds_at(grid: Grid, rows: float, context: float) -> float:
    """Bilinear between points, with the last slope beyond them, constant along an axis of one point; never negative."""
    low, high, part = _between(grid.rows, rows)
    return max(0.0, (1 - part) * _along(grid, low, context) + part * _along(grid, high, context))


def _along(grid: Grid, row: int, context: float) -> float:
    low, high, part = _between(grid.contexts, context)
    seconds = grid.seconds[row]
    return (1 - part) * seconds[low] + part * seconds[high]


def _between(points: Sequence[int], value: float) -> tuple[int, int, float]:
    """The two points that a value is interpolated from, and its part of the way; outside of 0 … 1 beyond them."""
    if len(points) == 1:
        return 0, 0, 0.0
    low = min(max(bisect_right(points, value) - 1, 0), len(points) - 2)
    return low, low + 1, (value - points[low]) / (points[low + 1] - points[low])


FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """One kind of step on one device: `cumulative_s[i]` is for layers [0, i), so that a span is a difference."""

    cumulative_s: FloatArray
    embed_s: float
    head_s: float
    step_s: float

    def span_s(self, first: int, last: int) -> float:
        seconds = float(self.cumulative_s[last] - self.cumulative_s[first]) + self.step_s
        seconds += self.embed_s if first == 0 else 0.0
        return seconds + (self.head_s if last == len(self.cumulative_s) - 1 else 0.0)

    def add(self, other: StageSeconds, weight: float) -> StageSeconds:
        """This step and, `weight` times, another one."""
        return StageSeconds(
            cumulative_s=self.cumulative_s + weight * other.cumulative_s,
            embed_s=self.embed_s + weight * other.embed_s,
            head_s=self.head_s + weight * other.head_s,
            step_s=self.step_s + weight * other.step_s,
        )


class CostModel:
    """Device `i` is `pool.devices[i]`. Hidden states cross in one dtype: what all devices compute in, else bfloat16."""

    def __init__(
        self, profile: ModelProfile, pool: PoolTimes, workload: Workload, wire_dtype: DType | None = None
    ) -> None:
        self.profile = profile
        self.pool = pool
        self.workload = workload
        self.memory_model = MemoryModel(profile, workload.context_tokens, workload.concurrency)
        dtypes = {times.device.compute_dtype for times in pool.devices}
        self.wire_dtype: DType = wire_dtype or (dtypes.pop() if len(dtypes) == 1 else "bfloat16")
        self._links = {(link.source, link.target): link for link in pool.links}
        self._decode = lru_cache(maxsize=None)(self._decode_uncached)
        self._prefill = lru_cache(maxsize=None)(self._prefill_uncached)

    # Stages

    def decode(self, device: int, group: int) -> StageSeconds:
        """A decode step of `group` sequences, nothing else at work on the device's host."""
        return self._decode(device, group)

    def chunk(self, device: int, tokens: int, before: int, *, is_last: bool) -> StageSeconds:
        """One chunk of a prompt; only its last one asks for logits, of one row."""
        times = self.pool.devices[device]
        return StageSeconds(
            cumulative_s=_cumulative_s(times, "prefill", tokens, before),
            embed_s=seconds_at(times.embed, tokens, 0),
            head_s=seconds_at(times.head, 1, 0) if is_last else 0.0,
            step_s=times.step_s,
        )

    def prefill(self, device: int, *, busy: bool) -> StageSeconds:
        """All chunks of the workload's prompt, one after the other."""
        return self._prefill(device, busy)

    def busy_factor(self, device: int, num_used: int) -> float:
        """How much slower a device is while `num_used` devices of its memory pool work, itself among them.

        Measured for one and for all of them; in between, linear.
        """
        others = self.pool_sizes[self.pool_of[device]] - 1
        return 1.0 + (self.pool.devices[device].busy - 1.0) * (num_used - 1) / others if others else 1.0

    def load_seconds(self, device: int, group: int) -> StageSeconds:
        """What a decode step of `group` keeps a device busy, with the prompts that its tokens stand for."""
        busy = self.workload.concurrency > 1
        return self.decode(device, group).add(self.prefill(device, busy=busy), group / self.workload.output_tokens)

    def trip_seconds(self, device: int, group: int) -> StageSeconds:
        """What a token waits for a device: its step, and its part of one prompt's prefill."""
        busy = self.workload.concurrency > 1
        return self.decode(device, group).add(self.prefill(device, busy=busy), 1 / self.workload.output_tokens)

    # Links

    def link(self, source: int | None, target: int | None) -> LinkTimes | None:
        """Between devices; None is the engine. None as the answer: there is no way."""
        return self._links.get((self.host(source), self.host(target)))

    def hidden_bytes(self, tokens: int) -> int:
        return tokens * self.profile.hidden_size * DTYPE_BYTES[self.wire_dtype]

    def hop_s(self, source: int | None, target: int | None, tokens: int) -> float:
        """From a stage's result to the next one's start. Ids to stage 0 and from the last are a few bytes."""
        link = self.link(source, target)
        if link is None:
            return float("inf")
        return link.hop_s + self.transfer_s(source, target, tokens)

    def transfer_s(self, source: int | None, target: int | None, tokens: int) -> float:
        """How long a hop's bytes occupy the link."""
        link = self.link(source, target)
        if link is None:
            return float("inf")
        if source is None or target is None:
            return 0.0
        return self.hidden_bytes(tokens) / link.bytes_per_s

    def load_transfer_s(self, source: int | None, target: int | None, group: int) -> float:
        """What a decode step of `group` occupies a link, with the prompts that its tokens stand for."""
        tokens = group * self.workload.prompt_tokens
        return (
            self.transfer_s(source, target, group)
            + self.transfer_s(source, target, tokens) / self.workload.output_tokens
        )

    def trip_hop_s(self, source: int | None, target: int | None, group: int) -> float:
        """What a token waits for a hop: its step's, and its part of those of one prompt's chunks."""
        work = self.workload
        chunks = work.chunks(busy=work.concurrency > 1)
        prompt_s = sum(self.hop_s(source, target, tokens) for tokens, _ in chunks)
        return self.hop_s(source, target, group) + prompt_s / work.output_tokens

    # Memory

    def free_bytes(self, device: int) -> int:
        return self.pool.devices[device].device.free_bytes

    @cached_property
    def pool_of(self) -> tuple[str, ...]:
        return tuple(times.device.memory_pool for times in self.pool.devices)

    @cached_property
    def pool_sizes(self) -> dict[str, int]:
        return {key: self.pool_of.count(key) for key in self.pool_of}

    @cached_property
    def pool_total_bytes(self) -> dict[str, int]:
        return pool_totals(times.device for times in self.pool.devices)

    def memory_bytes(self, device: int, first: int, last: int) -> int:
        return self.memory_model.memory_bytes(self.pool.devices[device].device, first, last)

    def name(self, device: int) -> str:
        return self.pool.devices[device].device.name

    def host(self, device: int | None) -> str:
        return self.pool.head if device is None else self.pool.devices[device].device.host

    def _decode_uncached(self, device: int, group: int) -> StageSeconds:
        times = self.pool.devices[device]
        return StageSeconds(
            cumulative_s=_cumulative_s(times, "decode", group, self.workload.decode_context_tokens),
            embed_s=seconds_at(times.embed, group, 0),
            head_s=seconds_at(times.head, group, 0),
            step_s=times.step_s,
        )

    def _prefill_uncached(self, device: int, busy: bool) -> StageSeconds:
        chunks = self.workload.chunks(busy=busy)
        total = StageSeconds(cumulative_s=np.zeros(self.profile.num_layers + 1), embed_s=0.0, head_s=0.0, step_s=0.0)
        for number, (tokens, before) in enumerate(chunks):
            total = total.add(self.chunk(device, tokens, before, is_last=number == len(chunks) - 1), 1.0)
        return total


def stage_decode_s(times: DeviceTimes, first: int, last: int, rows: float, context: float) -> float:
    """A decode step of `rows` sequences with a mean of `context` tokens of KV on the stage of layers [first, last)."""
    seconds = StageSeconds(
        cumulative_s=_cumulative_s(times, "decode", rows, context),
        embed_s=seconds_at(times.embed, rows, 0),
        head_s=seconds_at(times.head, rows, 0),
        step_s=times.step_s,
    )
    return seconds.span_s(first, last)


def _cumulative_s(times: DeviceTimes, lane: str, rows: float, context: float) -> FloatArray:
    grids: list[Grid] = [layer.decode if lane == "decode" else layer.prefill for layer in times.layers]
    by_kind = [seconds_at(grid, rows, context) for grid in grids]
    return np.concatenate([[0.0], np.cumsum([by_kind[kind] for kind in times.kinds])])


Objective = Literal["latency", "throughput", "auto"]


@dataclass(frozen=True, slots=True)
class PlacedStage:
    """Layers [first, last) on device number `device` of the pool."""

    device: int
    first: int
    last: int


Assignment = tuple[PlacedStage, ...]


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
        for placed, factor in zip(assignment, slowdown_factors(costs, assignment, busy=busy), strict=True)
    )
    return total + sum(costs.trip_hop_s(source, target, group) for source, target in _hops(assignment))


def resource_loads(costs: CostModel, assignment: Assignment) -> dict[str, float]:
    """Seconds that each resource works for a group's decode step and its part of the prompts, by name."""
    work, busy = costs.workload, costs.workload.concurrency > 1
    group = work.group_size(len(assignment))
    loads: dict[str, float] = {}
    for placed, factor in zip(assignment, slowdown_factors(costs, assignment, busy=busy), strict=True):
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


def slowdown_factors(costs: CostModel, assignment: Assignment, *, busy: bool) -> list[float]:
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
    slow = slowdown_factors(costs, assignment, busy=groups > 1)
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
