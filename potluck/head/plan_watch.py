"""The plan watch compares what stages do with what was predicted, and finds a better plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.cost import CostModel, PlacedStage, Prediction, predict, stage_decode_s
from planner.measurements import DeviceTimes, PoolTimes
from planner.plan import Plan
from potluck.head.planning import plan_with, profile_of, workload_of
from potluck.head.profiling.calibration import (
    Deviation,
    Observed,
    StepPredictor,
    observe,
    scale_times,
    update_deviation,
)
from potluck.store.manifest import StoredModel
from potluck.system.settings import Settings
from transport.errors import PotluckError
from transport.messages.control import Stats

_MIN_GAIN = 1.05
"""A plan that gives less than this times what there is now is not worth loading the ring for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BetterPlan:
    """Rates are predicted with the times as they turned out to be, of the rate that the plan's strategy is after."""

    plan: Plan
    times: PoolTimes
    now_tokens_per_s: float
    tokens_per_s: float
    why: str


class PlanWatch:
    """Of one loaded plan. `times` are what it was made from; call `look` some times a minute."""

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
            seen = observe(self._before[index], after, _step_predictor(times, stage.first, stage.last))
            seen = _discount_neighbours(seen, times.busy)
            # Few steps at a time add up until they are enough to tell.
            if seen is not None or self._before[index] is None:
                self._before[index] = after
            self.deviations[index] = update_deviation(self.deviations[index], seen, now_s)
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


def _discount_neighbours(seen: Observed | None, busy: float) -> Observed | None:
    """Devices that share a host's cores are slower, by up to `busy`, while the others work too: that was predicted."""
    if seen is None or seen.ratio <= 1:
        return seen
    return replace(seen, predicted_s=min(seen.measured_s, seen.predicted_s * busy))
