"""A ring sends each worker its stage, attaches the engine to them, and knows what is wrong with it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from planner.plan import Plan
from potluck.engine.settings import RingSpec
from potluck.head.engine_process import EngineProcess
from potluck.head.pool import Pool, PoolWorker
from potluck.host.local_host import ThisHost
from potluck.store.manifest import StoredModel
from transport.errors import ConfigError, PotluckError, RingDown
from transport.links.secure_endpoints import Where
from transport.messages.control import Connect, Load, Unload
from transport.messages.pool import SharedModel
from transport.messages.ring import Fence

MAX_STEP_TOKENS = 2048
"""A bound for what stages accept, more than the scheduler sends: a chunk of a prompt (`EngineLimits`) and decodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RingStage:
    """One stage of a ring that is up."""

    index: int
    first: int
    last: int
    worker: PoolWorker


class Ring:
    """One plan on the pool's workers.

    Neighbours on one host talk over ipc, others over TCP, where each lets in the key of its neighbour's host alone.
    """

    def __init__(
        self,
        pool: Pool,
        model: StoredModel,
        plan: Plan,
        *,
        here: ThisHost,
        epoch: int,
        shared: Callable[[Sequence[RingStage]], Mapping[int, SharedModel]] = lambda stages: {},
    ) -> None:
        """`here` is the host of the engine; `shared` says where stages get the model from, by number, if it does not
        lie on their hosts. Raises ConfigError if two neighbours can't reach each other."""
        self._pool = pool
        self._here = here
        self._model = model
        self._shared = shared
        self.plan = plan
        self.fence = Fence(secrets.token_hex(8), epoch, plan.id)
        self.stages: tuple[RingStage, ...] = self._assign()
        self._check_reachable()
        self._shared_models: Mapping[int, SharedModel] = {}

    def start(self, engine: EngineProcess, on_loading: Callable[[Sequence[PoolWorker]], None]) -> None:
        """Load every stage, with `engine` attached to them. Raises the first error, after which it is of no use."""
        self._shared_models = self._shared(self.stages)
        endpoints = self._pool.start_loading([(stage.worker, self._load(stage)) for stage in self.stages])
        following = [*endpoints[1:], engine.attach(self._spec(first_stage=endpoints[0]))]
        for stage, next in zip(self.stages, following, strict=True):
            self._pool.send(stage.worker, Connect(self.fence, next, self._key_after(stage.index)))

        def watched(workers: Sequence[PoolWorker]) -> None:
            engine.check()
            on_loading(workers)

        self._pool.wait_until_loaded([stage.worker for stage in self.stages], on_loading=watched)

    def errors(self) -> tuple[PotluckError, ...]:
        """What its workers have said of this load, and no other."""
        faults = [stage.worker.fault for stage in self.stages if stage.worker.fence == self.fence]
        return tuple(error for error in faults if error is not None)

    def unload(self) -> None:
        """Have every stage close its sockets and free what it holds; does not wait."""
        for stage in self.stages:
            self._pool.send(stage.worker, Unload(self.fence))

    def _assign(self) -> tuple[RingStage, ...]:
        by_name = {worker.register.device: worker for worker in self._pool.workers()}
        gone = [stage.device for stage in self.plan.stages if stage.device not in by_name]
        if gone:
            raise RingDown(f"{gone[0]} left while the ring was planned", hint="start again")
        return tuple(
            RingStage(index=index, first=stage.first, last=stage.last, worker=by_name[stage.device])
            for index, stage in enumerate(self.plan.stages)
        )

    def _host_before(self, index: int) -> str:
        """Of who sends to stage `index`; the engine is before the first and, as `len(stages)`, after the last."""
        return self.stages[index - 1].worker.register.host if index else self._here.name

    def _listen_at(self, index: int, host: str) -> Where:
        return "local" if self._host_before(index) == host else "network"

    def _key_before(self, index: int) -> str:
        """The key of the host before stage `index` (or, as `len(stages)`, before the engine), empty for its own."""
        host = self._here.name if index == len(self.stages) else self.stages[index].worker.register.host
        if self._host_before(index) == host:
            return ""
        return self._pool.key_of(self.stages[index - 1].worker) if index else self._pool.own_key

    def _key_after(self, index: int) -> str:
        """The same of the host after stage `index`; -1 is the engine."""
        after = index + 1
        host = self._here.name if index < 0 else self.stages[index].worker.register.host
        if after == len(self.stages):
            return "" if host == self._here.name else self._pool.own_key
        worker = self.stages[after].worker
        return "" if worker.register.host == host else self._pool.key_of(worker)

    def _check_reachable(self) -> None:
        ends = [(stage.worker.register.host, stage.worker.register.address) for stage in self.stages]
        for index, (host, address) in enumerate([*ends, (self._here.name, self._here.address)]):
            if address is None and self._listen_at(index, host) == "network":
                raise ConfigError(
                    f"{host} can't be reached from {self._host_before(index)}",
                    hint="start both without --no-lan, or one with other devices",
                )

    def _load(self, stage: RingStage) -> Load:
        return Load(
            fence=self.fence,
            stage=stage.index,
            spec=self.plan.stages[stage.index].spec,
            model_path=str(self._model.path),
            max_step_tokens=MAX_STEP_TOKENS,
            listen=self._listen_at(stage.index, stage.worker.register.host),
            upstream=self._key_before(stage.index),
            shared=self._shared_models.get(stage.index),
        )

    def _spec(self, *, first_stage: str) -> RingSpec:
        plan = self.plan
        return RingSpec(
            fence=self.fence,
            first_stage=first_stage,
            first_stage_key=self._key_after(-1),
            upstream=self._key_before(len(self.stages)),
            listen=self._listen_at(len(self.stages), self._here.name),
            address=self._here.address,
            num_stages=len(self.stages),
            wire_dtype=plan.wire_dtype,
            context_tokens=plan.context_tokens,
            kv_capacity_tokens=plan.kv_capacity_tokens,
            max_step_tokens=MAX_STEP_TOKENS,
            stage_times=plan.times,
            hops_s=sum(plan.prediction.hops_s),
            has_window=any(window is not None and window < plan.context_tokens for window in self._model.spec.windows),
        )
