"""The loader measures a pool's devices and plans a ring; again whenever the pool has changed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from devices.hardware.device import UnavailableDevice
from planner.measurements import PoolTimes
from planner.plan import Plan
from potluck.head.models.source import ModelSource
from potluck.head.plan_watch import PlanWatch
from potluck.head.planning import choose_weights, device_of, estimate_times, plan_for, profile_of
from potluck.head.pool import Pool, PoolWorker
from potluck.head.profiling.measure import MeasureOptions, pool_times_for, save_deviation
from potluck.head.progress import HeadProgress
from potluck.head.ring import Ring
from potluck.host.local_host import ThisHost
from potluck.store.manifest import StoredModel
from potluck.system.settings import Settings
from transport.messages.ring import WeightsForm


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRing:
    """A model, its plan, and what will compare both with what the stages do."""

    model: StoredModel
    plan: Plan
    watch: PlanWatch


class RingLoader:
    """Plans of one model. It holds no ring. `here` is the head's host, also after it has moved."""

    def __init__(
        self,
        settings: Settings,
        progress: HeadProgress,
        *,
        pool: Pool,
        here: ThisHost,
        run_dir: Path,
        model: ModelSource,
        first_devices: Sequence[str],
    ) -> None:
        """`first_devices` are the names of this host's, in the order they were asked for."""
        self._settings = settings
        self._progress = progress
        self._pool = pool
        self._run_dir = run_dir
        self.source = model
        self._model: StoredModel
        self._first_devices = {name: index for index, name in enumerate(first_devices)}
        self._weights: WeightsForm = "stored"
        self.here = here

    def plan(self, times: PoolTimes | None = None) -> PlannedRing:
        """Plan with `times`, or with what is measured now. Raises PotluckError."""
        unmeasured: tuple[UnavailableDevice, ...] = ()
        has_others = any(worker.is_remote for worker in self._pool.workers())
        model = self._model = self.source.prepare(self._progress.say, for_others=has_others)
        if times is None:
            times, unmeasured = self._measure()
        plan = plan_for(model, times, self._settings, weights=self._weights, left_out=unmeasured)
        return PlannedRing(model=model, plan=plan, watch=PlanWatch(model, times, plan, self._settings))

    def ring_of(self, planned: PlannedRing, epoch: int) -> Ring:
        """On the workers that are there. Raises PotluckError if one is not."""
        return Ring(
            self._pool,
            planned.model,
            planned.plan,
            here=self.here,
            epoch=epoch,
            shared=self.source.share_for_stages,
        )

    def save_deviations(self, watch: PlanWatch) -> None:
        """How far stages are off their plan counts in the next one."""
        for device, ratio in watch.deviating(time.time()).items():
            save_deviation(self._model, self._pool, device, ratio, self._weights)

    def _workers_in_order(self) -> list[PoolWorker]:
        """This host's devices in the order they were asked for, then those that joined."""
        last = len(self._first_devices)
        return sorted(self._pool.workers(), key=lambda worker: self._first_devices.get(worker.register.device, last))

    def _measure(self) -> tuple[PoolTimes, tuple[UnavailableDevice, ...]]:
        """Times of all devices with this model, this host's first, in the order they were asked for. Chooses the form
        of its weights first."""
        workers = self._workers_in_order()
        devices = [device_of(worker.register) for worker in workers]
        self._weights = choose_weights(
            profile_of(self._model), devices, self.here.name, self._settings, self._progress.say
        )
        if self._settings.estimate:
            return estimate_times(self._model, devices, self.here.name, self._weights), ()
        times, unmeasured = pool_times_for(
            self._model,
            self._pool,
            self.here,
            run_dir=self._run_dir,
            say=self._progress.say,
            measuring=self._progress.measuring,
            options=MeasureOptions(
                weights=self._weights, fresh=self._settings.fresh, in_turn=self._settings.measure_in_turn
            ),
            shared=self.source.share_for_worker,
        )
        order = {worker.register.device: index for index, worker in enumerate(workers)}
        in_order = sorted(times.devices, key=lambda one: order[one.device.name])
        return replace(times, devices=tuple(in_order)), unmeasured
