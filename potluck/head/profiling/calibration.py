"""Predicted against measured: how far a stage in use is off its plan, whether that lasts, and what is learned from it.

Pure: statistics and times come in as values, `now_s` is whatever clock the caller has (seconds since the epoch for what
is kept in the cache).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from planner.measurements import DeviceTimes
from transport.messages.control import DecodeBucket, Stats
from transport.messages.measure import Grid, LayerTimes

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
    """How a stage has been doing; `since_s` is when it was first seen off and has been ever since, None: it is not.

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
    """A device took `factor` times what was measured of it before, as seen at `at_s`."""

    factor: float
    at_s: float


def observe(before: Stats | None, after: Stats, predict: StepPredictor) -> Observed | None:
    """Decode steps between two looks; None if there are too few to tell, or the stage was loaded anew in between."""
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


def update_deviation(deviation: Deviation, seen: Observed | None, now_s: float) -> Deviation:
    """The deviation after another look. A look on the other side of the prediction, or near it, starts anew."""
    if seen is None:
        return deviation
    if not is_deviating(seen.ratio):
        return Deviation(ratio=seen.ratio)
    same_side = deviation.since_s is not None and (deviation.ratio > 1) == (seen.ratio > 1)
    base = deviation if same_side else Deviation(since_s=now_s)
    measured_s, predicted_s = base.measured_s + seen.measured_s, base.predicted_s + seen.predicted_s
    return replace(
        base,
        ratio=measured_s / predicted_s,
        num_steps=base.num_steps + seen.num_steps,
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
    """None where counters went back: they begin anew with each load."""
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
