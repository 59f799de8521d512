"""These rings have the engine in this process, over one stage in a thread or over worker processes."""

from __future__ import annotations

import queue
import secrets
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import zmq
from msgspec import structs

from devices.hardware.device import Device
from potluck.engine.loop import Engine, RingEnds
from potluck.engine.settings import EngineLimits
from potluck.engine.tokenizer import Tokenizer
from potluck.head.pool import Pool
from potluck.host.local_host import ThisHost
from potluck.host.node import Node
from shard.formats.spec import Backend, ModelSpec
from shard.pieces.open import open_checkpoint
from shard.stage import ShardBackend, StageSpec
from shard.worker.load import load_shard
from shard.worker.local_stage import LocalStage
from shard.worker.serve import StageServer
from transport.codec import EdgeLimits, Received
from transport.links.link import Receiver, Sender, memory_link
from transport.links.zmq_link import ZmqReceiver, ZmqSender
from transport.messages.control import Connect, Load
from transport.messages.requests import Delta, EngineDown, EngineEvent, EngineReady, Finished, RequestFailed, Submit
from transport.messages.ring import DataMessage, DType, Fence, Sampled, Sampling, Tokens, WeightsForm

CONTEXT_TOKENS = 2048
MAX_STEP_TOKENS = 1024
PROMPT = "Write a long story about a lighthouse keeper and a storm. " * 8
_TIMEOUT_S = 300.0
_STARTS_WITHIN_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One answer: seconds from submission to the first token; the rate of the others; medians over decode steps."""

    prompt_tokens: int
    tokens_per_s: float
    ttft_s: float
    stage_p50_s: tuple[float, ...]
    hops_s: tuple[float, ...]
    """Of each decode step: what is left of its round trip outside of the stages' compute, per message."""

    @property
    def hop_p50_s(self) -> float:
        return statistics.median(self.hops_s)


class _TimedLinks:
    """Both ends of a ring's links at the engine, noting what decode steps spend outside of the stages, per message."""

    def __init__(self, sender: Sender, receiver: Receiver) -> None:
        self._sender = sender
        self._receiver = receiver
        self._sent: dict[int, float] = {}
        self.hops_s: list[float] = []

    def send(self, message: DataMessage, buffers: Sequence[memoryview] = ()) -> None:
        if isinstance(message, Tokens) and sum(len(entry.token_ids) for entry in message.entries) == 1:
            self._sent[message.step] = time.perf_counter()
        self._sender.send(message, buffers)

    def receive(self, timeout_s: float) -> Received | None:
        received = self._receiver.receive(timeout_s)
        if received is not None and isinstance(received.message, Sampled):
            came, sampled = time.perf_counter(), received.message
            sent = self._sent.pop(sampled.step, None)
            if sent is not None:
                self.hops_s.append((came - sent - sum(sampled.seconds)) / (len(sampled.seconds) + 1))
        return received

    def wake(self) -> None:
        self._receiver.wake()

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()


class BenchRing:
    """A ring that is up, with its engine in a thread of this process."""

    def __init__(
        self,
        name: str,
        model: Path,
        timed: _TimedLinks,
        fence: Fence,
        num_stages: int,
        stage_p50: Callable[[], list[float]],
    ) -> None:
        spec = open_checkpoint(model).spec
        self.name = name
        self._timed = timed
        self._stage_p50 = stage_p50
        self._events: queue.SimpleQueue[tuple[float, EngineEvent]] = queue.SimpleQueue()
        self._engine = Engine(
            model=model.name,
            tokenizer=Tokenizer(model),
            emit=lambda event: self._events.put((time.perf_counter(), event)),
            clock=time.monotonic,
        )
        limits = EngineLimits(
            context_tokens=CONTEXT_TOKENS,
            kv_capacity_tokens=CONTEXT_TOKENS,
            vocab_size=spec.vocab_size,
            num_stages=num_stages,
            prefix_cache=False,  # every run computes its whole prompt
        )
        self._engine.attach_ends(fence, RingEnds(limits=limits, receiver=timed, connect=lambda is_cancelled: timed))
        self._engine.warm_up(fence)
        self._thread = threading.Thread(target=self._engine.run, daemon=True)
        self._thread.start()
        self._wait_for(EngineReady)

    def run(self, prompt: str, num_tokens: int) -> RunResult:
        """One greedy answer of exactly `num_tokens`, unless the model ends it before."""
        self._timed.hops_s.clear()
        started = time.perf_counter()
        self._engine.submit(
            Submit(
                request=secrets.token_hex(4),
                messages=({"role": "user", "content": prompt},),
                sampling=Sampling(temperature=0.0),
                max_tokens=num_tokens,
            )
        )
        first_s, _ = self._wait_for(Delta)
        _, finished = self._wait_for(Finished)
        assert isinstance(finished, Finished)
        if finished.completion_tokens < num_tokens // 2:
            raise RuntimeError(f"the answer ended after {finished.completion_tokens} tokens: choose another prompt")
        return RunResult(
            prompt_tokens=finished.prompt_tokens,
            tokens_per_s=(finished.completion_tokens - 1) / finished.decode_s,
            ttft_s=first_s - started,
            stage_p50_s=tuple(self._stage_p50()),
            hops_s=tuple(self._timed.hops_s),
        )

    def close(self) -> None:
        self._engine.stop()
        self._thread.join(10.0)

    def _wait_for(self, kind: type[EngineEvent]) -> tuple[float, EngineEvent]:
        while True:
            at_s, event = self._events.get(timeout=_TIMEOUT_S)
            if isinstance(event, kind):
                return at_s, event
            if isinstance(event, RequestFailed | EngineDown):
                raise RuntimeError(f"{event.message} ({event.code})")


@contextmanager
def unsplit_ring(model: Path, dtype: DType) -> Iterator[BenchRing]:
    """All layers in one stage, in a thread of this process."""
    spec = open_checkpoint(model).spec
    fence = Fence("bench", 0, "unsplit")
    shard = load_whole(model, dtype)
    limits = _limits(spec, fence, dtype)
    engine_sender, stage_receiver = memory_link(limits)
    stage_sender, engine_receiver = memory_link(limits)
    server = StageServer(LocalStage(shard), shard.spec, stage_receiver, stage_sender, fence=fence, index=0)
    stopping = threading.Event()
    thread = threading.Thread(target=server.run, args=(stopping.is_set,), daemon=True)
    thread.start()
    timed = _TimedLinks(engine_sender, engine_receiver)
    ring = BenchRing("unsplit", model, timed, fence, 1, lambda: [server.counters.decode_p50_s])
    try:
        yield ring
    finally:
        ring.close()
        stopping.set()
        stage_receiver.wake()
        thread.join(10.0)


@contextmanager
def split_ring(model: Path, dtype: DType, num_stages: int) -> Iterator[BenchRing]:
    """Worker processes with equal shares of the work, the head counted as what it costs."""
    spec = open_checkpoint(model).spec
    fence = Fence("bench", num_stages, "split")
    bounds = equal_bounds(spec, num_stages)
    limits = _limits(spec, fence, dtype)
    devices = [stage_device(f"cpu-{index}", "torch", dtype) for index in range(num_stages)]
    with worker_pool(devices) as (context, pool, run_dir):
        receiver = ZmqReceiver(context, f"ipc://{run_dir}/engine", limits)
        workers = pool.workers()
        loads = stage_loads(fence, model, bounds, dtype)
        endpoints = pool.start_loading(list(zip(workers, loads, strict=True)))
        following = [*endpoints[1:], receiver.endpoint]
        for worker, next in zip(workers, following, strict=True):
            pool.send(worker, Connect(fence, next))
        pool.wait_until_loaded(workers, on_loading=lambda _: None)
        sender = ZmqSender(context, endpoints[0], limits, name="the bench")

        def stage_p50() -> list[float]:
            pool.request_stats(workers)
            return [worker.stats.decode_p50_s for worker in workers if worker.stats is not None]

        ring = BenchRing(f"{num_stages} stages", model, _TimedLinks(sender, receiver), fence, num_stages, stage_p50)
        try:
            yield ring
        finally:
            ring.close()
            sender.close()
            receiver.close()


@contextmanager
def worker_pool(
    devices: Sequence[Device], here: ThisHost | None = None
) -> Iterator[tuple[zmq.Context[zmq.Socket[bytes]], Pool, Path]]:
    """A pool of worker processes on this host, one for each device, with a folder for sockets and logs."""
    here = here or ThisHost(name="bench")
    run_dir = Path(tempfile.mkdtemp(prefix="plb-"))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        pool = Pool(context, run_dir, on_change=lambda: None, here=here)
        node = Node(
            control=pool.endpoint,
            logs=run_dir,
            run_dir=run_dir,
            on_exit=pool.on_worker_exit,
            keys_file=here.keys_file,
        )
        try:
            node.start(list(devices))
            pool.wait_for_devices([device.name for device in devices], len(devices), _STARTS_WITHIN_S)
            yield context, pool, run_dir
        finally:
            node.stop()
            pool.close()
    finally:
        context.destroy(0)
        shutil.rmtree(run_dir, ignore_errors=True)


def stage_loads(fence: Fence, model: Path, bounds: Sequence[int], dtype: DType) -> list[Load]:
    """For stages of the model in `model` that are cut at `bounds`."""
    num_layers = bounds[-1]
    return [
        Load(
            fence=fence,
            stage=index,
            spec=_stage_spec(num_layers, first, last, dtype),
            model_path=str(model),
            max_step_tokens=MAX_STEP_TOKENS,
            listen="local",
        )
        for index, (first, last) in enumerate(pairwise(bounds))
    ]


def load_whole(
    model: Path,
    dtype: DType,
    *,
    backend: Backend = "torch",
    weights: WeightsForm = "stored",
    kv_tokens: int = CONTEXT_TOKENS,
) -> ShardBackend:
    """All layers in one stage, in this process."""
    checkpoint = open_checkpoint(model)
    num_layers = checkpoint.spec.num_layers
    spec = structs.replace(
        _stage_spec(num_layers, 0, num_layers, dtype),
        device="mlx:cpu" if backend == "mlx" else "cpu",
        weights=weights,
        kv_capacity_tokens=kv_tokens,
    )
    return load_shard(checkpoint, spec, backend=backend)


def equal_bounds(spec: ModelSpec, num_stages: int) -> list[int]:
    """Layer bounds of stages that read about the same number of parameters a token; the head counts, on the last."""
    total = sum(spec.layer_params) + spec.head_params
    bounds, done = [0], 0
    for layer, params in enumerate(spec.layer_params):
        done += params
        if len(bounds) < num_stages and done >= total * len(bounds) / num_stages:
            bounds.append(layer + 1)
    return [*bounds, spec.num_layers]


def _stage_spec(num_layers: int, first: int, last: int, dtype: DType) -> StageSpec:
    return StageSpec(
        first=first,
        last=last,
        num_layers=num_layers,
        device="cpu",
        compute_dtype=dtype,
        wire_dtype=dtype,
        next_dtype=dtype,
        context_tokens=CONTEXT_TOKENS,
        kv_capacity_tokens=CONTEXT_TOKENS,
    )


def _limits(spec: ModelSpec, fence: Fence, dtype: DType) -> EdgeLimits:
    return EdgeLimits(
        fence=fence,
        hidden_size=spec.hidden_size,
        dtype=dtype,
        vocab_size=spec.vocab_size,
        context_tokens=CONTEXT_TOKENS,
        max_step_tokens=MAX_STEP_TOKENS,
    )


def stage_device(name: str, backend: Backend, dtype: DType) -> Device:
    """One thread, and as much memory as a stage wants."""
    return Device(
        name=name,
        backend=backend,
        kind="mlx" if backend == "mlx" else "cpu",
        host="bench",
        threads=1,
        free_bytes=2**40,
        total_bytes=2**40,
        memory_pool="bench",
        bandwidth_bytes_per_s=1e10,
        compute_dtype=dtype,
    )
