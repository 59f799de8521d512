"""Errors of predictions, and how good the recommended plans are, from visits."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One plan, once. `promised` was noted before `measured` (one chat, many chats); `failed` says why there is none.

    `stages` are (device, first, last)."""

    plan: str
    round: int
    started: float
    stages: list[list[Any]] = field(default_factory=list)
    promised: dict[str, Any] = field(default_factory=dict)
    measured: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None

    @property
    def promised_rates(self) -> tuple[float, float]:
        """Tokens per second of one chat and of many."""
        return self.promised["tokens_per_s"], self.promised["tokens_per_s_many"]

    @property
    def measured_rates(self) -> tuple[float, float]:
        one, many = self.measured
        return one["decode_tokens_per_s"], many["decode_tokens_per_s"]

    @property
    def with_prompts(self) -> tuple[float, float]:
        """Tokens per second of many chats, prompts included, which is what throughput is after: promised, measured."""
        return self.promised["workload_tokens_per_s"], self.measured[1]["tokens_per_s"]

    @property
    def errors(self) -> tuple[float, float]:
        """Promised over measured, less one."""
        one, many = (p / m - 1 for p, m in zip(self.promised_rates, self.measured_rates, strict=True))
        return one, many


def summary(visits: Sequence[Visit]) -> dict[str, Any]:
    """Medians over rounds for every plan that worked, over plans for all, and the visits themselves.

    Plans that came out alike are one; what was asked for is in `asked`.
    """
    done = [visit for visit in visits if visit.failed is None]
    plans = [_plan(name, [visit for visit in done if _layout(visit) == name]) for name in _unique(_layout, done)]
    medians: dict[str, Any] = {"plans": len(plans)}
    if plans:
        medians |= {
            "abs_error_one": statistics.median(abs(plan["error_one"]) for plan in plans),
            "abs_error_many": statistics.median(abs(plan["error_many"]) for plan in plans),
            "abs_error_with_prompts": statistics.median(abs(plan["error_with_prompts"]) for plan in plans),
            "latency_of_best": _of_best(plans, done, "latency", "measured_one", lambda one: one.measured_rates[0]),
            "throughput_of_best": _of_best(
                plans, done, "throughput", "measured_with_prompts", lambda one: one.with_prompts[1]
            ),
            "throughput_of_best_decoding": _of_best(
                plans, done, "throughput", "measured_many", lambda one: one.measured_rates[1]
            ),
        }
    return {"medians": medians, "plans": plans, "visits": [asdict(visit) for visit in visits]}


def _plan(layout: str, visits: Sequence[Visit]) -> dict[str, Any]:
    def median(value: Callable[[Visit], float]) -> float:
        return statistics.median(value(visit) for visit in visits)

    return {
        "stages": layout,
        "asked": _unique(lambda visit: visit.plan, visits),
        "visits": len(visits),
        "promised_one": median(lambda visit: visit.promised_rates[0]),
        "measured_one": median(lambda visit: visit.measured_rates[0]),
        "error_one": median(lambda visit: visit.errors[0]),
        "promised_many": median(lambda visit: visit.promised_rates[1]),
        "measured_many": median(lambda visit: visit.measured_rates[1]),
        "error_many": median(lambda visit: visit.errors[1]),
        "promised_with_prompts": median(lambda visit: visit.with_prompts[0]),
        "measured_with_prompts": median(lambda visit: visit.with_prompts[1]),
        "error_with_prompts": median(lambda visit: visit.with_prompts[0] / visit.with_prompts[1] - 1),
    }


def _of_best(
    plans: Sequence[dict[str, Any]], visits: Sequence[Visit], asked: str, name: str, rate: Callable[[Visit], float]
) -> float | None:
    """What the visits to recommended plans gave (they need not be the same in every round), as a share of the best
    plan's median; `name` is that of `rate` in a plan's row."""
    recommended = [rate(visit) for visit in visits if visit.plan == asked]
    best = max(plan[name] for plan in plans)
    return float(statistics.median(recommended) / best) if recommended else None


def _layout(visit: Visit) -> str:
    return ",".join(f"{device}={last - first}" for device, first, last in visit.stages)


def _unique(key: Callable[[Visit], str], visits: Sequence[Visit]) -> list[str]:
    return list(dict.fromkeys(key(visit) for visit in visits))
