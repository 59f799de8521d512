"""The cost model: seconds of stages and hops, for one model on one pool under one workload.

Formulas and their sources: docs/decisions/0005-cost-model.md. All times are of measured layers, added up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from planner.demand import Demand, pool_totals
from planner.interpolate import seconds_at
from planner.measured import DeviceTimes, Grid, LinkTimes, PoolTimes
from planner.profile import ModelProfile
from planner.workload import Workload
from transport.messages import DTYPE_BYTES, DType

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """One kind of step on one device: `ends[i]` is the time of layers [0, i), so that a span is a difference."""

    ends: Floats
    embed_s: float
    head_s: float
    step_s: float

    def span_s(self, first: int, last: int) -> float:
        seconds = float(self.ends[last] - self.ends[first]) + self.step_s
        seconds += self.embed_s if first == 0 else 0.0
        return seconds + (self.head_s if last == len(self.ends) - 1 else 0.0)

    def plus(self, other: StageSeconds, weight: float) -> StageSeconds:
        """This step and, `weight` times, another one."""
        return StageSeconds(
            ends=self.ends + weight * other.ends,
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
        self.demand = Demand(profile, workload.context_tokens, workload.concurrency)
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
            ends=_ends(times, "prefill", tokens, before),
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
        return self.decode(device, group).plus(self.prefill(device, busy=busy), group / self.workload.output_tokens)

    def trip_seconds(self, device: int, group: int) -> StageSeconds:
        """What a token waits for a device: its step, and its part of one prompt's prefill."""
        busy = self.workload.concurrency > 1
        return self.decode(device, group).plus(self.prefill(device, busy=busy), 1 / self.workload.output_tokens)

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
        return self.demand.memory_bytes(self.pool.devices[device].device, first, last)

    def name(self, device: int) -> str:
        return self.pool.devices[device].device.name

    def host(self, device: int | None) -> str:
        return self.pool.head if device is None else self.pool.devices[device].device.host

    def _decode_uncached(self, device: int, group: int) -> StageSeconds:
        times = self.pool.devices[device]
        return StageSeconds(
            ends=_ends(times, "decode", group, self.workload.decode_context_tokens),
            embed_s=seconds_at(times.embed, group, 0),
            head_s=seconds_at(times.head, group, 0),
            step_s=times.step_s,
        )

    def _prefill_uncached(self, device: int, busy: bool) -> StageSeconds:
        chunks = self.workload.chunks(busy=busy)
        total = StageSeconds(ends=np.zeros(self.profile.num_layers + 1), embed_s=0.0, head_s=0.0, step_s=0.0)
        for number, (tokens, before) in enumerate(chunks):
            total = total.plus(self.chunk(device, tokens, before, is_last=number == len(chunks) - 1), 1.0)
        return total


def stage_decode_s(times: DeviceTimes, first: int, last: int, rows: float, context: float) -> float:
    """A decode step of `rows` sequences with a mean of `context` tokens of KV on the stage of layers [first, last)."""
    seconds = StageSeconds(
        ends=_ends(times, "decode", rows, context),
        embed_s=seconds_at(times.embed, rows, 0),
        head_s=seconds_at(times.head, rows, 0),
        step_s=times.step_s,
    )
    return seconds.span_s(first, last)


def _ends(times: DeviceTimes, lane: str, rows: float, context: float) -> Floats:
    grids: list[Grid] = [layer.decode if lane == "decode" else layer.prefill for layer in times.layers]
    by_kind = [seconds_at(grid, rows, context) for grid in grids]
    return np.concatenate([[0.0], np.cumsum([by_kind[kind] for kind in times.kinds])])
