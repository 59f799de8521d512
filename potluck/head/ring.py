"""A ring sends each worker its stage, starts the engine behind them, and knows when it is down."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from planner.plan import Plan
from potluck.engine.settings import EngineSettings
from potluck.head.pool import Pool, PoolWorker
from potluck.host.local_host import ThisHost
from potluck.store.manifest import StoredModel
from transport.errors import ConfigError, NeighbourGone, PotluckError, RingDown
from transport.links.endpoints import fixed_local_endpoint, free_port, has_ipc, is_tcp, tcp_endpoint
from transport.links.secure_endpoints import Where
from transport.messages.control import Connect, Load, Unload
from transport.messages.pool import SharedModel
from transport.messages.ring import Fence
from transport.process.child_process import ChildProcess, stop_processes

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
    """One loaded model over the pool's workers. `take_down` is safe at any time.

    Neighbours on one host talk over ipc, others over TCP, where each lets in the key of its neighbour's host alone.
    """

    def __init__(
        self,
        pool: Pool,
        model: StoredModel,
        plan: Plan,
        *,
        here: ThisHost,
        run_dir: Path,
        logs: Path,
        epoch: int,
        prefix_cache: bool = True,
        shared: Callable[[Sequence[RingStage]], Mapping[int, SharedModel]] = lambda stages: {},
    ) -> None:
        """`here` is the host of the engine; `shared` says where stages get the model from, by number, if it does not
        lie on their hosts. Raises ConfigError if two neighbours can't reach each other."""
        self._pool = pool
        self._here = here
        self._model = model
        self._run_dir = run_dir
        self._epoch = epoch
        self._prefix_cache = prefix_cache
        self._shared = shared
        self._engine_log = logs / "engine.log"
        self._engine: ChildProcess | None = None
        self.plan = plan
        self.fence = Fence(secrets.token_hex(8), epoch, plan.id)
        self.stages: tuple[RingStage, ...] = self._assign()
        self.error: PotluckError | None = None
        self._check_reachable()
        self._shared_models: Mapping[int, SharedModel] = {}
        self.api_endpoint = fixed_local_endpoint(run_dir, f"api-{epoch}")
        """Where the engine answers the HTTP side."""

    @property
    def engine_pid(self) -> int | None:
        return None if self._engine is None else self._engine.pid

    def start(self, on_loading: Callable[[Sequence[PoolWorker]], None]) -> None:
        """Load every stage; the engine starts meanwhile. Raises the first error, after which `take_down` is due."""
        self._shared_models = self._shared(self.stages)
        endpoints = self._pool.start_loading([(stage.worker, self._load(stage)) for stage in self.stages])
        following = [*endpoints[1:], self._start_engine(first_stage=endpoints[0])]
        workers = [stage.worker for stage in self.stages]
        self._pool.connect(
            [
                (stage.worker, Connect(self.fence, next, self._key_after(stage.index)))
                for stage, next in zip(self.stages, following, strict=True)
            ]
        )

        def watched(workers: Sequence[PoolWorker]) -> None:
            if (error := self.engine_error()) is not None:
                raise error
            on_loading(workers)

        self._pool.wait_until_loaded(workers, on_loading=watched)

    def mark_down(self, error: PotluckError) -> bool:
        """Remember why the ring can't serve. True if that is news: the first error, or the cause of a first symptom."""
        is_news = self.error is None or (isinstance(self.error, NeighbourGone) and not isinstance(error, NeighbourGone))
        if is_news:
            self.error = error
        return is_news

    def engine_error(self) -> PotluckError | None:
        """Why the engine process is gone, if it is."""
        if self._engine is None or self._engine.exit_code() is None:
            return None
        words = self._engine.last_log_line()
        return RingDown(
            f"the engine ended with exit code {self._engine.exit_code()}" + (f": {words}" if words else ""),
            hint=f"its log: {self._engine_log}",
        )

    def stop_engine(self) -> None:
        if self._engine is not None:
            stop_processes([self._engine])

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

    def _start_engine(self, *, first_stage: str) -> str:
        """Returns where it listens for the last stage."""
        address = self._here.address
        if address is None or self._listen_at(len(self.stages), self._here.name) == "local":
            listen = fixed_local_endpoint(self._run_dir, f"engine-{self._epoch}")
            self._engine = self._engine_child(self._engine_arguments(first_stage, listen, None), ())
            return listen
        if not has_ipc():  # Nor can a listening socket be handed on there.
            listen = tcp_endpoint(address, free_port(address))
            self._engine = self._engine_child(self._engine_arguments(first_stage, listen, None), ())
            return listen
        # Bound here, so that its port is known before the engine is.
        with socket.create_server((address, 0)) as listener:
            listen = tcp_endpoint(address, listener.getsockname()[1])
            arguments = self._engine_arguments(first_stage, listen, listener.fileno())
            self._engine = self._engine_child(arguments, (listener.fileno(),))
        return listen

    def _keys_for(self, *endpoints: str) -> str | None:
        keys_file = self._here.keys_file
        return str(keys_file) if keys_file is not None and any(map(is_tcp, (*endpoints, self.api_endpoint))) else None

    def _engine_child(self, arguments: list[str], inherit: tuple[int, ...]) -> ChildProcess:
        return ChildProcess("potluck.engine.process", arguments, log=self._engine_log, threads=1, inherited_fds=inherit)

    def _engine_arguments(self, first_stage: str, listen: str, listener: int | None) -> list[str]:
        spec = self._model.spec
        settings = EngineSettings(
            model=self._model.name,
            model_path=str(self._model.path),
            api=self.api_endpoint,
            listen=listen,
            listener=listener,
            first_stage=first_stage,
            fence=self.fence,
            num_stages=len(self.stages),
            hidden_size=spec.hidden_size,
            vocab_size=spec.vocab_size,
            wire_dtype=self.plan.wire_dtype,
            context_tokens=self.plan.context_tokens,
            kv_capacity_tokens=self.plan.kv_capacity_tokens,
            max_step_tokens=MAX_STEP_TOKENS,
            stage_times=self.plan.times,
            hops_s=sum(self.plan.prediction.hops_s),
            has_window=any(window is not None and window < self.plan.context_tokens for window in spec.windows),
            prefix_cache=self._prefix_cache,
            keys=self._keys_for(first_stage, listen),
            first_stage_key=self._key_after(-1),
            upstream=self._key_before(len(self.stages)),
        )
        return ["--settings", msgspec.json.encode(settings).decode(), "--remove", str(self._run_dir)]
