"""What the rounds of `bench.stage_speed` say: medians, ratios within a round, and which targets are met."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Sense = Literal["at least", "at most"]

Round = dict[str, float]
"""One round's numbers, by name: "potluck decode" in tokens/s, "potluck first 512" in seconds, …"""

SAME_FILE = "llama.cpp"
REQUANTIZED = ("llama.cpp Q4_0", "llama.cpp Q8_0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`value(round)` is None where a contestant is missing; without a limit it is only told."""

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


TARGETS: tuple[Target, ...] = (
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


def judged(rounds: Sequence[Round], targets: Sequence[Target] = TARGETS) -> list[dict[str, Any]]:
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


def medians(rounds: Sequence[Round]) -> dict[str, float]:
    return {name: round(statistics.median(found[name] for found in rounds), 4) for name in rounds[0]}


def agreement(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers have in common from their start."""
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return min(len(one), len(other))
