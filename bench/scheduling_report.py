"""What a schedule could do at best, what it did, and the targets. Pure: seconds and counts in, ratios out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench.stage_report import Round, Target, ratio
from transport.control_messages import Stats

STREAMS = (2, 4, 8)
PEER_STREAMS = (1, 2, 4)


def bound_tokens_per_s(groups: float, rows: float, stage_s: Sequence[float], hops_s: float) -> float:
    """`groups` groups of `rows` sequences: each goes round in at least Σ stages + hops, and the slowest stage takes one
    step after another."""
    return groups * rows / max(sum(stage_s) + hops_s, groups * max(stage_s))


def filled_ring(stage_s: Sequence[float], hops_s: float) -> int:
    """B* = ⌈(Σ stages + hops) / max stage⌉: groups that keep the slowest stage busy."""
    return math.ceil((sum(stage_s) + hops_s) / max(stage_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSteps:
    """What a stage's decode steps of about one size were: means over the steps."""

    rows: float
    seconds: float


def busiest(before: Stats, after: Stats) -> DecodeSteps:
    """The steps of that size on which a stage spent the most time between two looks at it. The few of other sizes,
    while streams come and go, are left out. Raises ValueError if there were none."""
    old = {bucket.largest_rows: bucket for bucket in before.decode_buckets}
    found = []
    for bucket in after.decode_buckets:
        known = old.get(bucket.largest_rows)
        steps, rows, seconds = bucket.steps, bucket.rows, bucket.seconds
        if known is not None:
            steps, rows, seconds = steps - known.steps, rows - known.rows, seconds - known.seconds
        if steps:
            found.append((seconds, DecodeSteps(rows=rows / steps, seconds=seconds / steps)))
    if not found:
        raise ValueError("no decode step was counted")
    return max(found, key=lambda one: one[0])[1]


def percentile_s(values: Iterable[float], percent: float) -> float:
    """The nearest one; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


def gaps_between(chunks_s: Sequence[float], begin_s: float, end_s: float) -> list[float]:
    """Gaps between arrivals that ended in (begin, end]."""
    return [after - before for before, after in pairwise(chunks_s) if begin_s < after <= end_s]


def _at_least(name: str, limit: float | None, numerator: str, denominator: str) -> Target:
    return Target(name=name, limit=limit, sense="at least", value=ratio(numerator, denominator))


def _at_most(name: str, limit: float | None, numerator: str, denominator: str) -> Target:
    return Target(name=name, limit=limit, sense="at most", value=ratio(numerator, denominator))


_SINGLE_LIMITS = {2: 1.8, 4: 2.0, 8: 2.5}
_PEER_LIMITS: dict[int, float | None] = {1: None, 2: 1.5, 4: 1.4}

TARGETS: tuple[Target, ...] = (
    _at_least("one stream, 2 stages over unsplit", 0.95, "2 stages, one stream", "unsplit, one stream"),
    _at_least("one stream, 2 stages over a worker of its own", None, "2 stages, one stream", "1 stage, one stream"),
    *(
        _at_least(f"{count} streams over one", _SINGLE_LIMITS[count], f"{count} streams", "1 streams")
        for count in STREAMS
    ),
    *(
        _at_least(
            f"{count} streams over the bound of its own steps", 0.85, f"{count} streams", f"{count} streams bound"
        )
        for count in (1, *STREAMS)
    ),
    *(
        _at_least(
            f"{count} streams over the best bound of stages driven apart",
            0.85,
            f"{count} streams",
            f"{count} streams driven bound",
        )
        for count in (1, *STREAMS)
    ),
    *(
        _at_least(
            f"{count} streams over what steps without an engine reach", None, f"{count} streams", f"{count} driven"
        )
        for count in (1, *STREAMS)
    ),
    _at_least("filled ring over 1 / max stage", 0.9, "filled", "filled bound"),
    _at_least("first token of 2048, one step over the engine's chunks", 1.7, "prefill one step", "prefill"),
    _at_least("first token of 2048, one step over chunks of 256", None, "prefill one step", "prefill 256"),
    _at_most("gap p50 of 4 chats while a prompt of 4096 runs, over before", None, "gap p50 during", "gap p50 before"),
    _at_most("gap p95 of 4 chats while a prompt of 4096 runs, over before", 1.5, "gap p95 during", "gap p95 before"),
    _at_most("gap p99 of 4 chats while a prompt of 4096 runs, over before", None, "gap p99 during", "gap p99 before"),
    _at_most(
        "longest gap of 4 chats while a prompt of 4096 runs, over before", None, "gap max during", "gap max before"
    ),
    _at_most("first token of 4096 beside 4 chats, over alone", 4.0, "long beside", "long alone"),
    _at_most("first token of a chat's second turn over its first", 0.15, "second turn", "first turn"),
    _at_least("one stream over HTTP, over llama.cpp", 1.0, "potluck 1 decode", "llama.cpp 1 decode"),
    *(
        _at_least(
            f"end to end, {count} streams over llama.cpp",
            _PEER_LIMITS[count],
            f"potluck {count} end to end",
            f"llama.cpp {count} end to end",
        )
        for count in PEER_STREAMS
    ),
)


LAB_TARGETS: tuple[Target, ...] = (
    _at_least("filled ring with 10 ms on every hop over without", 0.85, "filled with delay", "filled without delay"),
    _at_least("filled ring over 1 / max stage", None, "filled without delay", "filled bound without delay"),
    _at_least("filled ring with delay over 1 / max stage", None, "filled with delay", "filled bound with delay"),
    _at_least("first token of 2048, one step over the engine's chunks", 2.3, "prefill one step", "prefill"),
    _at_least("first token of 2048, one step over chunks of 256", None, "prefill one step", "prefill 256"),
)


def medians(rounds: Sequence[Round]) -> Round:
    """Over the rounds that have a value."""
    names = dict.fromkeys(name for found in rounds for name in found)
    return {name: statistics.median(found[name] for found in rounds if name in found) for name in names}


def rounded(found: Round) -> Round:
    return {name: float(f"{value:.5g}") for name, value in found.items()}
