"""The ring controller collects facts, lets `decide` choose, and does it: the one thread that changes anything."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from rich.markup import escape

from devices.hardware.interfaces import lan_address
from potluck.head.decide import (
    CAUSE_GRACE_S,
    LOSSES_COUNT_FOR_S,
    ChangeAddress,
    EndRing,
    Facts,
    GiveUp,
    LoadFailure,
    LoadRing,
    RingFacts,
    Stay,
    WaitForPeer,
    WorkerFacts,
    decide,
    root_cause,
)
from potluck.head.endpoint import HttpEndpoint
from potluck.head.engine_process import EngineProcess
from potluck.head.loader import RingLoader
from potluck.head.models.source import RemoteModel
from potluck.head.plan_watch import BetterPlan, PlanWatch
from potluck.head.pool import Pool
from potluck.head.progress import HeadProgress
from potluck.head.ring import Ring
from potluck.host.local_host import ThisHost
from potluck.store.manifest import StoredModel
from transport.errors import HostRevoked, NeighbourGone, PotluckError, RingDown

_WATCH_INTERVAL_S = 5.0
_ADDRESS_INTERVAL_S = 2.0
_LOOK_AGAIN_S = 1.0
_BUSY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class RingView:
    """What is to be shown of the newest ring; `error` says why it is down."""

    phase: Literal["starting", "ready", "down"] = "starting"
    ring: Ring | None = None
    watch: PlanWatch | None = None
    error: PotluckError | None = None
    engine_pid: int | None = None


class RingController:
    """One thread calls `start` and `run`. The rest is thread-safe."""

    def __init__(
        self,
        *,
        pool: Pool,
        endpoint: HttpEndpoint,
        progress: HeadProgress,
        start_engine: Callable[[StoredModel], EngineProcess],
        changed: threading.Event,
    ) -> None:
        """`changed` is set by whoever knows that a fact may have changed."""
        self._start_engine = start_engine
        self._pool = pool
        self._endpoint = endpoint
        self._progress = progress
        self._loader: RingLoader
        self._move: Callable[[ThisHost], None] | None = None
        self._changed = changed
        self._stats_lock = threading.Lock()
        self._engine: EngineProcess | None = None
        self._epoch = 0
        self._next_address_s = self._next_watch_s = 0.0
        self._planned_with: frozenset[bytes] | None = None
        self._failures: tuple[LoadFailure, ...] = ()
        self._losses_s: tuple[float, ...] = ()
        self._ended_with: PotluckError | None = None
        self._ended_s: float = 0.0
        self._first_error_s: float | None = None
        self._new_address: str | None = None
        self._must_reload = self._is_replan_wanted = self._has_served = False
        self.view = RingView()

    def request_replan(self) -> BetterPlan | None:
        """Load the better plan, if there is one, once nobody waits for an answer."""
        watch = self.view.watch
        better = watch.better if watch is not None else None
        self._is_replan_wanted = better is not None
        self._changed.set()
        return better

    def request_stats(self) -> None:
        """Of all stages, fresh."""
        ring = self.view.ring
        if ring is not None:
            with self._stats_lock:
                self._pool.request_stats([stage.worker for stage in ring.stages])

    def start(self, loader: RingLoader, move: Callable[[ThisHost], None] | None) -> None:
        """Load for the first time. `move` goes on at another address of this host; None where none is looked for.
        Raises PotluckError."""
        self._loader, self._move = loader, move
        while not self._has_served:
            self._turn()

    def run(self) -> None:
        """For ever: load anew when devices join or what was lost may come back, and say what goes wrong."""
        while True:
            self._turn()

    def stop(self) -> None:
        if self.view.watch is not None:
            self._loader.save_deviations(self.view.watch)
        if self._engine is not None:
            self._engine.stop()

    def _turn(self) -> None:
        self._changed.clear()
        match decide(self._facts()):
            case EndRing(error):
                if self._ended_with is None and self.view.phase == "ready":
                    self._losses_s = (*self._losses_s, time.monotonic())
                self._end_ring(error)
            case LoadRing(why, use_better_plan):
                if self._ended_with is None and not self._endpoint.is_idle():
                    self._changed.wait(_BUSY_S)
                else:
                    self._load(why, use_better_plan=use_better_plan)
            case ChangeAddress(address):
                self._change_address(address)
            case WaitForPeer(error):
                self._wait_for_peer(error)
            case GiveUp(error):
                raise error
            case Stay():
                self._check_plan()
                self._changed.wait(CAUSE_GRACE_S / 5 if self._is_grace_running() else _LOOK_AGAIN_S)

    def _is_grace_running(self) -> bool:
        return self._first_error_s is not None and self._ended_with is None

    def _facts(self) -> Facts:
        now_s = time.monotonic()
        self._losses_s = tuple(at_s for at_s in self._losses_s if now_s - at_s < LOSSES_COUNT_FOR_S)
        self._look_for_address(now_s)
        ring, watch = self.view.ring, self.view.watch
        return Facts(
            now_s=now_s,
            workers=tuple(
                WorkerFacts(
                    identity=worker.peer.identity,
                    device=worker.register.device,
                    last_heard_s=worker.peer.last_heard_s,
                )
                for worker in self._pool.workers()
            ),
            planned_with=self._planned_with,
            ring=self._ring_facts(ring, now_s) if ring is not None else None,
            failures=self._failures,
            losses_s=self._losses_s,
            new_address=self._new_address,
            must_reload=self._must_reload,
            is_replan_wanted=self._is_replan_wanted and watch is not None and watch.better is not None,
            has_served=self._has_served,
            can_wait_for_peer=isinstance(self._loader.source, RemoteModel),
        )

    def _ring_facts(self, ring: Ring, now_s: float) -> RingFacts:
        errors = self._errors(ring)
        if errors and self._first_error_s is None:
            self._first_error_s = now_s
        return RingFacts(
            workers=frozenset(stage.worker.peer.identity for stage in ring.stages),
            errors=errors,
            first_error_s=self._first_error_s,
            ended_with=self._ended_with,
            ended_s=self._ended_s,
        )

    def _errors(self, ring: Ring) -> tuple[PotluckError, ...]:
        """What is known to be wrong with this ring, and no other. What its engine says is a symptom: it names its
        neighbour, whatever has failed."""
        engine = self._engine
        exit_error = engine.exit_error() if engine is not None else None
        lost = engine.client.ring_error if engine is not None else None
        errors = (exit_error, NeighbourGone(lost.message, hint=lost.hint) if lost is not None else None)
        return (*ring.errors(), *(error for error in errors if error is not None))

    def _look_for_address(self, now_s: float) -> None:
        """Whether other hosts reach this one somewhere else than before: another Wi-Fi, a new lease."""
        if self._move is not None and now_s >= self._next_address_s:
            self._next_address_s = now_s + _ADDRESS_INTERVAL_S
            address = lan_address()
            self._new_address = address if address not in (None, self._loader.here.address) else None

    def _check_plan(self) -> None:
        """Compare what the stages do with the plan, now and then; a plan that would be better is said once."""
        ring, watch = self.view.ring, self.view.watch
        if ring is None or watch is None or self.view.phase != "ready" or time.monotonic() < self._next_watch_s:
            return
        self._next_watch_s = time.monotonic() + _WATCH_INTERVAL_S
        self.request_stats()
        had_better = watch.better is not None
        watch.update([stage.worker.stats for stage in ring.stages], time.time())
        if watch.better is not None and not had_better:
            self._progress.say(
                f"A better plan exists ({escape(watch.better.why)}): {watch.better.tokens_per_s:.1f} tokens/s instead "
                f"of {watch.better.now_tokens_per_s:.1f}. Apply it with: potluck replan"
            )

    def _end_ring(self, error: PotluckError, *, is_said: bool = True) -> None:
        """Its requests end with `error`; nobody sends to a stage of it any more, or hears from one."""
        was_ended = self._ended_with is not None
        self._endpoint.mark_down(error)
        self._ended_with = error
        self._must_reload = self._must_reload or isinstance(error, HostRevoked)
        self.view = replace(self.view, phase="down", error=error)
        if not was_ended:
            self._ended_s = time.monotonic()
            if self.view.ring is not None:
                self.view.ring.unload()
            if self._engine is not None:
                self._engine.end_ring(error)
        if is_said:
            self._progress.say(f"[bold red]The ring is down:[/bold red] {escape(str(error))}")

    def _load(self, why: str, *, use_better_plan: bool) -> None:
        better = self.view.watch.better if use_better_plan and self.view.watch is not None else None
        if self.view.watch is not None:
            self._loader.save_deviations(self.view.watch)
        if why:
            self._progress.say(escape(why))
        if self._ended_with is None:
            self._end_ring(RingDown("the ring is being loaded anew", hint="try again in a moment"), is_said=False)
        self._endpoint.disconnect()
        self._must_reload = self._is_replan_wanted = False
        self.view = replace(self.view, phase="starting")
        # Whoever registers from here on may come too late for this plan.
        self._planned_with = frozenset(worker.peer.identity for worker in self._pool.workers())
        self._epoch += 1
        try:
            self._bring_up(better)
        except PotluckError as error:
            self._failures = (
                *self._failures,
                LoadFailure(
                    error=error,
                    workers=self._planned_with,
                    at_s=time.monotonic(),
                    had_peer=isinstance(self._loader.source, RemoteModel) and self._loader.source.has_peer,
                ),
            )
            self._end_ring(error, is_said=self._has_served)
            return
        self._failures = ()
        self.view = replace(self.view, phase="ready", error=None)
        if self._has_served:
            self._progress.say(f"Ready at {self._endpoint.url}")
        self._has_served = True

    def _bring_up(self, better: BetterPlan | None) -> None:
        """Raises PotluckError: what says most of all that went wrong."""
        planned = self._loader.plan(better.times if better is not None else None)
        ring = self._loader.ring_of(planned, self._epoch)
        engine = self._engine_for(planned.model)
        self._ended_with = self._first_error_s = None
        self.view = replace(self.view, ring=ring, watch=planned.watch, error=None, engine_pid=engine.pid)
        num_stages = len(ring.stages)
        self._progress.say(f"Loading {planned.model.name} over {num_stages} stage{'s' if num_stages > 1 else ''}")
        try:
            ring.start(engine, self._progress.loading)
            self._progress.say("Warming up")
            self._endpoint.connect(engine.client)
            engine.warm_up(ring.fence)
        except PotluckError as error:
            raise self._cause(ring, error) from error

    def _engine_for(self, model: StoredModel) -> EngineProcess:
        """The one that runs, or a new one where it has ended, or the model lies elsewhere now."""
        engine = self._engine
        if engine is None or not engine.is_running() or engine.model_path != model.path:
            if engine is not None:
                engine.stop()
            engine = self._engine = self._start_engine(model)
        return engine

    def _cause(self, ring: Ring, error: PotluckError) -> PotluckError:
        """A worker or an engine that died says more than who missed it; it may take a moment."""
        deadline_s = time.monotonic() + (CAUSE_GRACE_S if isinstance(error, RingDown) else 0.0)
        while (cause := root_cause(self._errors(ring))) is None or isinstance(cause, NeighbourGone):
            if time.monotonic() >= deadline_s:
                return error
            time.sleep(CAUSE_GRACE_S / 10)
        return cause

    def _change_address(self, address: str) -> None:
        """Go on at this host's new address: its workers listen there, and others are told."""
        self._new_address = None
        self._progress.say(f"This host's address is {address} now")
        error: PotluckError = RingDown("this host's address has changed", hint="try again in a moment")
        if self._ended_with is None:
            self._end_ring(error)
        here = self._loader.here = replace(self._loader.here, address=address)
        assert self._move is not None, "it was looked for"
        try:
            self._move(here)
        except PotluckError as failed:
            self._end_ring(failed)
        self._must_reload = True

    def _wait_for_peer(self, error: PotluckError) -> None:
        source = self._loader.source
        assert isinstance(source, RemoteModel), "so it was decided"
        self._progress.say(f"[yellow]{escape(error.message)}[/yellow]")
        self._endpoint.disconnect()
        self.view = replace(self.view, phase="starting")
        source.wait_for_peer()
        self._must_reload = True
