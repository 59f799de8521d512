"""Targets judge the medians of rounds; bounds say what a schedule could do at best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeVar

from potluck.measure.result import say
from transport.messages.control import Stats

T = TypeVar("T")

Sense = Literal["at least", "at most"]

Round = dict[str, float]
"""One round's numbers, by name: "potluck decode" in tokens/s, "potluck first 512" in seconds, …"""

SAME_FILE = "llama.cpp"
REQUANTIZED = ("llama.cpp Q4_0", "llama.cpp Q8_0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`value(round)` is None where a system under test is missing; without a limit it is only shown."""

    name: str
    limit: float | None
    sense: Sense
    value: Callable[[Round], float | None]


def ratio(numerator: str, denominator: str) -> Callable[[Round], float | None]:
    def of(found: Round) -> float | None:
        if numerator not in found or denominator not in found:
            return None
        return found[numerator] / found[denominator]

    return of


def over_best(measure: str, best: Callable[[list[float]], float]) -> Callable[[Round], float | None]:
    """Ours over that of llama.cpp in whichever of its formats was the best of the round."""

    def of(found: Round) -> float | None:
        peers = [found[name] for peer in (SAME_FILE, *REQUANTIZED) if (name := f"{peer} {measure}") in found]
        return found[f"potluck {measure}"] / best(peers) if peers else None

    return of


STAGE_TARGETS: tuple[Target, ...] = (
    Target(
        name="decode, potluck over transformers bfloat16",
        limit=3.5,
        sense="at least",
        value=ratio("potluck decode", "transformers decode"),
    ),
    Target(
        name="decode, potluck over llama.cpp, same file",
        limit=0.85,
        sense="at least",
        value=ratio("potluck decode", f"{SAME_FILE} decode"),
    ),
    Target(
        name="first token of 512, llama.cpp, same file, over potluck",
        limit=2.0,
        sense="at least",
        value=ratio(f"{SAME_FILE} first 512", "potluck first 512"),
    ),
    Target(
        name="first token of 512, potluck over llama.cpp in its best format",
        limit=1.2,
        sense="at most",
        value=over_best("first 512", min),
    ),
    Target(
        name="decode, potluck over llama.cpp in its best format",
        limit=None,
        sense="at least",
        value=over_best("decode", max),
    ),
    Target(
        name="tokens/s of 4 sequences over those of 1",
        limit=2.0,
        sense="at least",
        value=ratio("potluck batch 4", "potluck batch 1"),
    ),
    Target(
        name="ms of a token outside of the linear kernels",
        limit=3.0,
        sense="at most",
        value=lambda found: found.get("potluck rest ms"),
    ),
)


def judge_targets(rounds: Sequence[Round], targets: Sequence[Target]) -> list[dict[str, Any]]:
    """For each target that could be measured: the median over rounds, its range, and whether it is met."""
    rows = []
    for target in targets:
        values = [value for found in rounds if (value := target.value(found)) is not None]
        if not values:
            continue
        row: dict[str, Any] = {
            "what": target.name,
            "median": round(statistics.median(values), 3),
            "min_max": [round(min(values), 3), round(max(values), 3)],
        }
        if target.limit is not None:
            row[target.sense] = target.limit
            row["met"] = is_met(statistics.median(values), target.limit, target.sense)
        rows.append(row)
    return rows


def is_met(value: float, limit: float, sense: Sense) -> bool:
    return value >= limit if sense == "at least" else value <= limit


def medians(rounds: Sequence[Round]) -> Round:
    """Over the rounds that have a value."""
    names = dict.fromkeys(name for found in rounds for name in found)
    return {name: statistics.median(found[name] for found in rounds if name in found) for name in names}


def rounded(found: Round) -> Round:
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def run_rounds(measure: Callable[[int], Round], rounds: int, name: str, targets: Sequence[Target]) -> dict[str, Any]:
    """Measure round after round, because machines drift; medians over rounds are judged."""
    found: list[Round] = []
    for number in range(rounds):
        say(f"{name}, round {number + 1} of {rounds}")
        found.append(measure(number))
    return {
        "rounds": rounds,
        "targets": judge_targets(found, targets),
        "medians": rounded(medians(found)),
        "values": [rounded(values) for values in found],
    }


def alternated(turns: Sequence[T], number: int) -> Sequence[T]:
    """In order, or in reverse every second round: who comes first has no advantage over rounds."""
    return turns if number % 2 == 0 else turns[::-1]


def agreement(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers have in common from their start."""
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return min(len(one), len(other))


STREAMS = (2, 4, 8)


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


def gaps_between(chunks_s: Sequence[float], begin_s: float, end_s: float) -> list[float]:
    """Gaps between arrivals that ended in (begin, end]."""
    return [after - before for before, after in pairwise(chunks_s) if begin_s < after <= end_s]


def _at_least(name: str, limit: float | None, numerator: str, denominator: str) -> Target:
    return Target(name=name, limit=limit, sense="at least", value=ratio(numerator, denominator))


def _at_most(name: str, limit: float | None, numerator: str, denominator: str) -> Target:
    return Target(name=name, limit=limit, sense="at most", value=ratio(numerator, denominator))


_SINGLE_LIMITS = {2: 1.8, 4: 2.0, 8: 2.5}

SCHEDULING_TARGETS: tuple[Target, ...] = (
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
            f"{count} streams over the best bound of stages driven without an engine",
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
    _at_most("gap p50 of 4 chats while a prompt of 4096 runs, over before", None, "gap p50 during", "gap p50 before"),
    _at_most("gap p95 of 4 chats while a prompt of 4096 runs, over before", 1.5, "gap p95 during", "gap p95 before"),
    _at_most("gap p99 of 4 chats while a prompt of 4096 runs, over before", None, "gap p99 during", "gap p99 before"),
    _at_most(
        "longest gap of 4 chats while a prompt of 4096 runs, over before", None, "gap max during", "gap max before"
    ),
    _at_most("first token of 4096 beside 4 chats, over alone", 4.0, "long beside", "long alone"),
)


LAB_TARGETS: tuple[Target, ...] = (
    _at_least("filled ring with 10 ms on every hop over without", 0.85, "filled with delay", "filled without delay"),
    _at_least("filled ring over 1 / max stage", None, "filled without delay", "filled bound without delay"),
    _at_least("filled ring with delay over 1 / max stage", None, "filled with delay", "filled bound with delay"),
)
