"""The loader measures a pool's devices, plans, loads a ring and warms it up; again whenever the pool has changed."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.markup import escape

from devices.hardware.device import UnavailableDevice
from planner.measurements import PoolTimes
from potluck.head.endpoint import HttpEndpoint
from potluck.head.models.source import ModelSource, RemoteModel
from potluck.head.plan_watch import PlanWatch
from potluck.head.planning import choose_weights, device_of, estimate_times, plan_for, profile_of
from potluck.head.pool import Pool, PoolWorker
from potluck.head.profiling.measure import MeasureOptions, pool_times_for, save_deviation
from potluck.head.progress import HeadProgress
from potluck.head.ring import Ring
from potluck.host.local_host import ThisHost
from potluck.store.manifest import StoredModel
from potluck.system.paths import logs_dir
from potluck.system.settings import Settings
from transport.errors import DownloadFailed, PotluckError, RingDown
from transport.messages.ring import WeightsForm

_READY_TIMEOUT_S = 300.0


class RingLoader:
    """One model's rings, one after the other. `ring` is the newest, `watch` compares it with its plan; both are None
    before the first plan. `here` is the head's host, also after it has moved."""

    def __init__(
        self,
        settings: Settings,
        progress: HeadProgress,
        *,
        pool: Pool,
        endpoint: HttpEndpoint,
        here: ThisHost,
        run_dir: Path,
        model: ModelSource,
        first_devices: Sequence[str],
    ) -> None:
        """`first_devices` are the names of this host's, in the order they were asked for."""
        self._settings = settings
        self._progress = progress
        self._pool = pool
        self._endpoint = endpoint
        self._run_dir = run_dir
        self._source = model
        self._model: StoredModel
        self._first_devices = {name: index for index, name in enumerate(first_devices)}
        self._stats_lock = threading.Lock()
        self._epoch = 0
        self._planned: set[bytes] = set()
        self._weights: WeightsForm = "stored"
        self.here = here
        self.ring: Ring | None = None
        self.watch: PlanWatch | None = None

    def load(self, times: PoolTimes | None = None) -> None:
        """Plan with `times`, or with what is measured now, load every stage, and warm the ring up.

        Raises PotluckError; the ring that failed is then `ring`, if it had come so far.
        """
        self._epoch += 1
        # Whoever registers from here on may come too late for this plan.
        self._planned = {worker.peer.identity for worker in self._pool.workers()}
        unmeasured: tuple[UnavailableDevice, ...] = ()
        has_others = any(worker.is_remote for worker in self._pool.workers())
        self._model = self._source.prepare(self._progress.say, for_others=has_others)
        if times is None:
            times, unmeasured = self._measure()
        plan = plan_for(self._model, times, self._settings, weights=self._weights, left_out=unmeasured)
        self.watch = PlanWatch(self._model, times, plan, self._settings)
        self.ring = Ring(
            self._pool,
            self._model,
            plan,
            here=self.here,
            run_dir=self._run_dir,
            logs=logs_dir(),
            epoch=self._epoch,
            prefix_cache=self._settings.prefix_cache,
            shared=self._source.share_for_stages,
        )
        num_stages = len(plan.stages)
        self._progress.say(f"Loading {self._model.name} over {num_stages} stage{'s' if num_stages > 1 else ''}")
        self.ring.start(self._progress.loading)
        self._progress.say("Warming up")
        client = self._endpoint.connect(self.ring.api_endpoint, self._pool.client_auth(self.ring.api_endpoint))
        try:
            client.wait_ready(_READY_TIMEOUT_S)
        except PotluckError as error:
            # A worker or the engine that died says more than the engine's client can.
            raise self.ring.error or self.ring.engine_error() or error from error

    def load_first(self) -> None:
        """`load`; where a host is away that has what lacks here of the model, wait for it. Once more, too, where it has
        just come back, or its model has changed meanwhile."""
        tries = 0
        while True:
            try:
                self.load()
                return
            except (DownloadFailed, RingDown) as error:
                source = self._source
                if not isinstance(source, RemoteModel):
                    raise
                tries += source.has_peer
                if tries > 1:
                    raise
                self._progress.say(f"[yellow]{escape(error.message)}[/yellow]")
            self._endpoint.disconnect()
            self.mark_down(RingDown("the model is not all here", hint="see the head's terminal"))
            self.stop_engine()
            source.wait_for_peer()

    def request_stats(self) -> None:
        """Of all stages, fresh. Thread-safe."""
        ring = self.ring
        if ring is not None:
            with self._stats_lock:
                self._pool.request_stats([stage.worker for stage in ring.stages])

    def check_plan(self) -> None:
        """Compare what the stages do with the plan; a plan that would be better is said once."""
        ring, watch = self.ring, self.watch
        if ring is None or watch is None:
            return
        self.request_stats()
        had_better = watch.better is not None
        watch.update([stage.worker.stats for stage in ring.stages], time.time())
        if watch.better is not None and not had_better:
            self._progress.say(
                f"A better plan exists ({escape(watch.better.why)}): {watch.better.tokens_per_s:.1f} tokens/s instead "
                f"of {watch.better.now_tokens_per_s:.1f}. Apply it with: potluck replan"
            )

    def is_planned(self, worker: PoolWorker) -> bool:
        """Whether the newest plan was made with that worker in the pool."""
        return worker.peer.identity in self._planned

    def save_deviations(self) -> None:
        """How far stages are off their plan counts in the next one."""
        if self.watch is not None:
            for device, ratio in self.watch.deviating(time.time()).items():
                save_deviation(self._model, self._pool, device, ratio, self._weights)

    def engine_error(self) -> PotluckError | None:
        """Why the ring's engine is gone, if that is news."""
        error = self.ring.engine_error() if self.ring is not None else None
        return error if error is not None and self.mark_down(error) else None

    def mark_down(self, error: PotluckError) -> bool:
        """Remember why the ring can't serve, if there is one; True if that is news."""
        return self.ring is not None and self.ring.mark_down(error)

    def stop_engine(self) -> None:
        if self.ring is not None:
            self.ring.stop_engine()

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
            shared=self._source.share_for_worker,
        )
        order = {worker.register.device: index for index, worker in enumerate(workers)}
        in_order = sorted(times.devices, key=lambda one: order[one.device.name])
        return replace(times, devices=tuple(in_order)), unmeasured
