"""The plan watch compares what stages do with what was predicted, whether that lasts, what is learned from it, and
whether another plan would be better.

Pure: statistics and times come in as values, `now_s` is whatever clock the caller has (seconds since the epoch for what
is kept in the cache).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from planner.cost import CostModel, PlacedStage, Prediction, predict, stage_decode_s
from planner.measurements import DeviceTimes, PoolTimes
from planner.plan import Plan
from potluck.head.planning import plan_with, profile_of, workload_of
from potluck.store.manifest import StoredModel
from potluck.system.settings import Settings
from transport.errors import PotluckError
from transport.messages.control import DecodeBucket, Stats
from transport.messages.measure import Grid, LayerTimes

_MIN_GAIN = 1.05
"""A plan with less than this times the present rate is not worth loading the ring for."""

DEVIATION_TOLERANCE = 0.25
"""A stage is off if it takes this much more or less than predicted."""

PERSISTS_S = 120.0
PERSISTS_STEPS = 200
_MIN_STEPS = 8
_HALF_LIFE_S = 86400.0
_LEARNING_RATE = 0.5
_MAX_FACTOR = 20.0

StepPredictor = Callable[[float, float], float]
"""Seconds of the stage's decode step, by sequences and their mean context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What a stage did between two looks at its statistics."""

    num_steps: int
    measured_s: float
    predicted_s: float

    @property
    def ratio(self) -> float:
        """Above 1: slower than predicted."""
        return self.measured_s / self.predicted_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """How a stage has been doing; `since_s` is when it was first off and has been ever since, None: it is not.

    `ratio` is that of all steps since then, or of the last look.
    """

    ratio: float = 1.0
    since_s: float | None = None
    num_steps: int = 0
    measured_s: float = 0.0
    predicted_s: float = 0.0

    def persists(self, now_s: float) -> bool:
        """Whether it has been off for long enough, and over enough steps, for a better plan to pay."""
        return self.since_s is not None and now_s - self.since_s >= PERSISTS_S and self.num_steps >= PERSISTS_STEPS


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedFactor:
    """A device took `factor` times what was measured of it before, as of `at_s`."""

    factor: float
    at_s: float


def observe(before: Stats | None, after: Stats, predict: StepPredictor) -> Observed | None:
    """Decode steps between two looks; None if there are too few to tell, or the stage was loaded again in between."""
    old = {bucket.largest_rows: bucket for bucket in before.decode_buckets} if before is not None else {}
    num_steps, measured_s, predicted_s = 0, 0.0, 0.0
    for bucket in after.decode_buckets:
        new = _difference(bucket, old.get(bucket.largest_rows))
        if new is None:
            return None
        if new.steps:
            num_steps += new.steps
            measured_s += new.seconds
            predicted_s += new.steps * predict(new.rows / new.steps, new.context_tokens / new.rows)
    if num_steps < _MIN_STEPS or predicted_s <= 0:
        return None
    return Observed(num_steps=num_steps, measured_s=measured_s, predicted_s=predicted_s)


def update_deviation(deviation: Deviation, observed: Observed | None, now_s: float) -> Deviation:
    """The deviation after another look. A look on the other side of the prediction, or near it, starts over."""
    if observed is None:
        return deviation
    if not is_deviating(observed.ratio):
        return Deviation(ratio=observed.ratio)
    same_side = deviation.since_s is not None and (deviation.ratio > 1) == (observed.ratio > 1)
    base = deviation if same_side else Deviation(since_s=now_s)
    measured_s, predicted_s = base.measured_s + observed.measured_s, base.predicted_s + observed.predicted_s
    return replace(
        base,
        ratio=measured_s / predicted_s,
        num_steps=base.num_steps + observed.num_steps,
        measured_s=measured_s,
        predicted_s=predicted_s,
    )


def is_deviating(ratio: float) -> bool:
    return ratio > 1 + DEVIATION_TOLERANCE or ratio < 1 / (1 + DEVIATION_TOLERANCE)


def learn(old: LearnedFactor | None, ratio: float, now_s: float) -> LearnedFactor:
    """Half of what a stage is off by, on top of what was known: `ratio` is measured against a plan that knew `old`."""
    factor = factor_at(old, now_s) * max(ratio, 1e-9) ** _LEARNING_RATE
    return LearnedFactor(factor=min(max(factor, 1 / _MAX_FACTOR), _MAX_FACTOR), at_s=now_s)


def factor_at(learned: LearnedFactor | None, now_s: float) -> float:
    """What is left of it: games end and laptops cool down, so it halves (on a logarithmic scale) every day."""
    if learned is None or not 0 < learned.factor < math.inf:
        return 1.0
    age_s = max(0.0, now_s - learned.at_s)
    return float(learned.factor ** (0.5 ** (age_s / _HALF_LIFE_S)))


def scale_times(times: DeviceTimes, factor: float) -> DeviceTimes:
    """The device as it is `factor` times slower in all it does."""
    if factor == 1:
        return times
    return replace(
        times,
        layers=tuple(
            LayerTimes(decode=_scaled(layer.decode, factor), prefill=_scaled(layer.prefill, factor))
            for layer in times.layers
        ),
        embed=_scaled(times.embed, factor),
        head=_scaled(times.head, factor),
        step_s=times.step_s * factor,
    )


def _scaled(grid: Grid, factor: float) -> Grid:
    return msgspec.structs.replace(grid, seconds=tuple(tuple(value * factor for value in row) for row in grid.seconds))


def _difference(after: DecodeBucket, before: DecodeBucket | None) -> DecodeBucket | None:
    """None where counters went back: they start over with each load."""
    if before is None:
        return after
    if after.steps < before.steps:
        return None
    return DecodeBucket(
        largest_rows=after.largest_rows,
        steps=after.steps - before.steps,
        rows=after.rows - before.rows,
        context_tokens=after.context_tokens - before.context_tokens,
        seconds=after.seconds - before.seconds,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BetterPlan:
    """Rates are predicted with the times as they turned out to be, of the rate that the plan's strategy is after."""

    plan: Plan
    times: PoolTimes
    now_tokens_per_s: float
    tokens_per_s: float
    why: str


class PlanWatch:
    """Of one loaded plan. `times` are what it was made from; call `update` some times a minute."""

    def __init__(self, model: StoredModel, times: PoolTimes, plan: Plan, settings: Settings) -> None:
        self._profile = profile_of(model, plan.weights, plan.kv)
        self._settings = settings
        self._times = times
        self.plan = plan
        self._by_name = {one.device.name: one for one in times.devices}
        self._before: list[Stats | None] = [None] * len(plan.stages)
        self._searched_for: tuple[tuple[str, float], ...] = ()
        self.deviations = [Deviation() for _ in plan.stages]
        self.better: BetterPlan | None = None

    def update(self, stats: Sequence[Stats | None], now_s: float) -> None:
        """Take in the stages' statistics, in the plan's order. Searches for a better plan when a stage has been off for
        long enough; that can take a second."""
        for index, (stage, after) in enumerate(zip(self.plan.stages, stats, strict=True)):
            if after is None:
                continue
            times = self._by_name[stage.device]
            observed = observe(self._before[index], after, _step_predictor(times, stage.first, stage.last))
            observed = _discount_neighbours(observed, times.busy)
            # Few steps at a time add up until they are enough to tell.
            if observed is not None or self._before[index] is None:
                self._before[index] = after
            self.deviations[index] = update_deviation(self.deviations[index], observed, now_s)
        off = self.deviating(now_s)
        # To a tenth: a ratio that trembles is not a reason to search again.
        wanted = tuple((name, round(ratio, 1)) for name, ratio in off.items())
        if wanted != self._searched_for:
            self._searched_for = wanted
            self.better = self._search(off) if off else None

    def deviating(self, now_s: float) -> dict[str, float]:
        """Devices whose stages have been off for long enough, and how many times slower than predicted they are."""
        return {
            stage.device: deviation.ratio
            for stage, deviation in zip(self.plan.stages, self.deviations, strict=True)
            if deviation.persists(now_s)
        }

    def _search(self, off: dict[str, float]) -> BetterPlan | None:
        if self._settings.layers is not None:
            return None  # Set by hand: the user's to change.
        times = replace(
            self._times,
            devices=tuple(scale_times(one, off.get(one.device.name, 1.0)) for one in self._times.devices),
        )
        workload = workload_of(self._profile, self._settings)
        try:
            found = plan_with(self._profile, times, self._settings, workload)
        except PotluckError:
            return None
        costs = CostModel(self._profile, _pool_of(times, self.plan), workload, self.plan.wire_dtype)
        now = _target_rate(predict(costs, _placed_stages(costs, self.plan)), self.plan.strategy)
        then = _target_rate(found.prediction, found.strategy)
        if then < now * _MIN_GAIN:
            return None
        why = ", ".join(f"{name} takes {ratio:.2f}× what was predicted" for name, ratio in off.items())
        return BetterPlan(plan=found, times=times, now_tokens_per_s=now, tokens_per_s=then, why=why)


def _pool_of(times: PoolTimes, plan: Plan) -> PoolTimes:
    """Only the devices of the plan, in its order."""
    by_name = {one.device.name: one for one in times.devices}
    return replace(times, devices=tuple(by_name[stage.device] for stage in plan.stages))


def _placed_stages(costs: CostModel, plan: Plan) -> tuple[PlacedStage, ...]:
    return tuple(PlacedStage(index, stage.first, stage.last) for index, stage in enumerate(plan.stages))


def _target_rate(prediction: Prediction, strategy: str) -> float:
    """The rate that a strategy is after, in tokens/s."""
    if strategy == "latency":
        return prediction.tokens_per_s
    return prediction.tokens_per_s_many if strategy == "throughput" else prediction.workload_tokens_per_s


def _step_predictor(times: DeviceTimes, first: int, last: int) -> StepPredictor:
    return lambda rows, context: stage_decode_s(times, first, last, rows, context)


def _discount_neighbours(observed: Observed | None, busy: float) -> Observed | None:
    """Devices that share a host's cores are slower, by up to `busy`, while the others work too: that was predicted."""
    if observed is None or observed.ratio <= 1:
        return observed
    return replace(observed, predicted_s=min(observed.measured_s, observed.predicted_s * busy))
