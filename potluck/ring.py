"""A ring's life: send each worker its stage, start the engine behind them, and know when it is down."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from planner.plan import Plan
from potluck.engine.settings import EngineSettings
from potluck.pool import Pool, PoolWorker
from potluck.processes import Child, stop_all
from potluck.store import StoredModel
from transport.errors import NeighbourGone, PotluckError, RingDown
from transport.messages import Fence, Load

MAX_STEP_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RingStage:
    """One stage of a ring that is up."""

    index: int
    first: int
    last: int
    worker: PoolWorker


class Ring:
    """One loaded model over the pool's workers. `take_down` is safe at any time."""

    def __init__(self, pool: Pool, model: StoredModel, plan: Plan, *, run_dir: Path, logs: Path, epoch: int) -> None:
        self._pool = pool
        self._model = model
        self._run_dir = run_dir
        self._epoch = epoch
        self._engine_log = logs / "engine.log"
        self._engine: Child | None = None
        self.plan = plan
        self.fence = Fence(secrets.token_hex(8), epoch, plan.id)
        self.stages: tuple[RingStage, ...] = self._assign()
        self.error: PotluckError | None = None

    @property
    def api_endpoint(self) -> str:
        """Where the engine answers the HTTP side."""
        return self._endpoint("api")

    @property
    def engine_pid(self) -> int | None:
        return None if self._engine is None else self._engine.pid

    def bring_up(self, tick: Callable[[Sequence[PoolWorker]], None]) -> None:
        """Load every stage; the engine starts meanwhile. Raises the first error, after which `take_down` is due."""
        self._engine = Child("potluck.engine.process", self._engine_arguments(), log=self._engine_log, threads=1)

        def watched(workers: Sequence[PoolWorker]) -> None:
            if (error := self.engine_exit()) is not None:
                raise error
            tick(workers)

        self._pool.load([(stage.worker, self._load(stage)) for stage in self.stages], tick=watched)

    def mark_down(self, error: PotluckError) -> bool:
        """Remember why the ring can't serve. True if that is news: the first error, or the cause of a first symptom."""
        is_news = self.error is None or (isinstance(self.error, NeighbourGone) and not isinstance(error, NeighbourGone))
        if is_news:
            self.error = error
        return is_news

    def engine_exit(self) -> PotluckError | None:
        """Why the engine process is gone, if it is."""
        if self._engine is None or self._engine.exit_code() is None:
            return None
        words = self._engine.last_words()
        return RingDown(
            f"the engine ended with exit code {self._engine.exit_code()}" + (f": {words}" if words else ""),
            hint=f"its log: {self._engine_log}",
        )

    def take_down(self) -> None:
        if self._engine is not None:
            stop_all([self._engine])

    def _assign(self) -> tuple[RingStage, ...]:
        by_name = {worker.register.device: worker for worker in self._pool.workers()}
        gone = [stage.device for stage in self.plan.stages if stage.device not in by_name]
        if gone:
            raise RingDown(f"{gone[0]} left while the ring was planned", hint="start again")
        return tuple(
            RingStage(index=index, first=stage.first, last=stage.last, worker=by_name[stage.device])
            for index, stage in enumerate(self.plan.stages)
        )

    def _endpoint(self, name: str) -> str:
        return f"ipc://{self._run_dir}/{name}-{self._epoch}"

    def _load(self, stage: RingStage) -> Load:
        is_last = stage.index == len(self.stages) - 1
        plan = self.plan
        return Load(
            fence=self.fence,
            stage=stage.index,
            first=stage.first,
            last=stage.last,
            num_layers=self._model.spec.num_layers,
            model_path=str(self._model.path),
            compute_dtype=plan.stages[stage.index].compute_dtype,
            wire_dtype=plan.wire_dtype,
            next_dtype=plan.wire_dtype,
            context_tokens=plan.context_tokens,
            kv_capacity_tokens=plan.kv_capacity_tokens,
            max_step_tokens=MAX_STEP_TOKENS,
            listen=self._endpoint(f"stage{stage.index}"),
            next=self._endpoint("engine" if is_last else f"stage{stage.index + 1}"),
        )

    def _engine_arguments(self) -> list[str]:
        spec = self._model.spec
        settings = EngineSettings(
            model=self._model.name,
            model_path=str(self._model.path),
            api=self.api_endpoint,
            listen=self._endpoint("engine"),
            first_stage=self._endpoint("stage0"),
            fence=self.fence,
            num_stages=len(self.stages),
            hidden_size=spec.hidden_size,
            vocab_size=spec.vocab_size,
            wire_dtype=self.plan.wire_dtype,
            context_tokens=self.plan.context_tokens,
            kv_capacity_tokens=self.plan.kv_capacity_tokens,
            max_step_tokens=MAX_STEP_TOKENS,
        )
        return ["--settings", msgspec.json.encode(settings).decode(), "--remove", str(self._run_dir)]
