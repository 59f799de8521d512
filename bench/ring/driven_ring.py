"""A ring without an engine: steps sent straight to its stages, in the simplest order there is. It shows what
stages take at a batch, and what hops cost."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import zmq

from bench.ring.engine_ring import BenchPool
from planner.plan import Plan
from potluck.head.pool import PoolWorker
from potluck.head.ring import RingStage
from potluck.store.manifest import StoredModel
from transport.codec import EdgeLimits
from transport.links.secure_endpoints import Where
from transport.links.zmq_link import ZmqReceiver, ZmqSender
from transport.messages.control import Connect, Load
from transport.messages.ring import Entry, Failed, Fence, Op, Open, Release, Sampled, Sampling, SequenceId, Tokens

_STEP_WITHIN_S = 300.0
_WARM_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DrivenRun:
    """`groups` groups of `rows` sequences in flight. Means over steps: of each stage's compute, and of a group's round
    trip."""

    groups: int
    rows: int
    tokens_per_s: float
    stage_s: tuple[float, ...]
    round_trip_s: float


class DrivenRing:
    """Its stages have nothing to do but what is asked for here."""

    def __init__(
        self,
        pool: BenchPool,
        workers: list[PoolWorker],
        fence: Fence,
        sender: ZmqSender,
        receiver: ZmqReceiver,
    ) -> None:
        self._pool = pool
        self._workers = workers
        self._fence = fence
        self._sender = sender
        self._receiver = receiver
        self._num_steps = 0
        self._num_sequences = 0

    def decode(self, groups: int, rows: int, *, prompts: Sequence[Sequence[int]], steps: int) -> DrivenRun:
        """Every group goes round `steps` times; each has `rows` of the prompts, of which there are groups · rows."""
        members = [self._new(rows) for _ in range(groups)]
        prompt_of = dict(zip((one for group in members for one in group), prompts, strict=True))
        length = {}
        token = {}
        for sequence, prompt in prompt_of.items():
            step = self._send((_open(sequence, prompt),), (Entry(sequence, 0, tuple(prompt), 1),))
            token[sequence] = self._wait_for(step).results[0].tokens[0].token_id
            length[sequence] = len(prompt)

        def send(group: int) -> int:
            entries = tuple(Entry(one, length[one], (token[one],), 1) for one in members[group])
            return self._send((), entries)

        before = None
        done = [0] * groups
        waiting: deque[tuple[int, int, float]] = deque()
        round_trips_s: list[float] = []
        started_s = time.perf_counter()
        for number in range(groups):
            sent_s = time.perf_counter()
            waiting.append((send(number), number, sent_s))
        while waiting:
            step, group, sent_s = waiting.popleft()
            for result in self._wait_for(step).results:
                token[result.sequence] = result.tokens[0].token_id
                length[result.sequence] += 1
            now_s = time.perf_counter()
            done[group] += 1
            if before is None and min(done) == _WARM_STEPS:
                before, started_s, counted = self._pool.stats(self._workers), time.perf_counter(), sum(done)
            elif before is not None:
                round_trips_s.append(now_s - sent_s)
            if done[group] < steps:
                # Before it is sent: who is woken by it may take this core.
                sent_s = time.perf_counter()
                waiting.append((send(group), group, sent_s))
        seconds = time.perf_counter() - started_s
        after = self._pool.stats(self._workers)
        assert before is not None
        self._wait_for(self._send(tuple(Release(one) for one in prompt_of), ()))
        return DrivenRun(
            groups=groups,
            rows=rows,
            tokens_per_s=(sum(done) - counted) * rows / seconds,
            stage_s=tuple(
                (new.decode_s - old.decode_s) / (new.decode_steps - old.decode_steps)
                for old, new in zip(before, after, strict=True)
            ),
            round_trip_s=statistics.fmean(round_trips_s),
        )

    def _new(self, count: int) -> list[SequenceId]:
        self._num_sequences += count
        return [SequenceId(self._num_sequences - index) for index in range(count)]

    def _send(self, ops: tuple[Op, ...], entries: tuple[Entry, ...]) -> int:
        self._num_steps += 1
        self._sender.send(Tokens(self._fence, self._num_steps, ops, entries))
        return self._num_steps

    def _wait_for(self, step: int) -> Sampled:
        deadline_s = time.monotonic() + _STEP_WITHIN_S
        while time.monotonic() < deadline_s:
            received = self._receiver.receive(1.0)
            match received.message if received is not None else None:
                case Sampled(step=done) as sampled if done == step:
                    return sampled
                case Failed(message=message):
                    raise RuntimeError(f"a stage failed: {message}")
        raise RuntimeError(f"step {step} did not come back within {_STEP_WITHIN_S:.0f} s")


def _open(sequence: SequenceId, ids: Sequence[int]) -> Open:
    return Open(sequence, tuple(ids), Sampling(temperature=0.0))


@contextmanager
def driven_ring(pool: BenchPool, model: StoredModel, plan: Plan, *, max_step_tokens: int) -> Iterator[DrivenRing]:
    """The plan's stages, with steps of up to `max_step_tokens`. Raises PotluckError."""
    fence = Fence("driven", 1, plan.id)
    workers = pool.workers_of(plan)
    limits = EdgeLimits(
        fence=fence,
        hidden_size=model.spec.hidden_size,
        dtype=plan.wire_dtype,
        vocab_size=model.spec.vocab_size,
        context_tokens=plan.context_tokens,
        max_step_tokens=max_step_tokens,
    )
    where: Where = "network" if pool.here.address is not None else "local"
    # Of who sends to each stage, and of who sends to this process.
    keys = [pool.pool.own_key, *map(pool.pool.key_of, workers)]
    # One of its own: the pool's has a handler for its keys already.
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    edges = pool.here.secure_endpoints(context, pool.run_dir)
    listen = edges.listen_at(where, "driver")
    receiver = ZmqReceiver(context, listen, limits, guard=edges.guard(listen, keys[-1]))
    stages = [
        RingStage(index=index, first=stage.first, last=stage.last, worker=worker)
        for index, (stage, worker) in enumerate(zip(plan.stages, workers, strict=True))
    ]
    shared = pool.share(model).share_for_stages(stages)
    loads = [
        Load(
            fence=fence,
            stage=index,
            spec=stage.spec,
            model_path=str(model.path),
            max_step_tokens=max_step_tokens,
            listen=where,
            upstream=upstream,
            shared=shared.get(index),
        )
        for index, (stage, upstream) in enumerate(zip(plan.stages, keys[:-1], strict=True))
    ]
    endpoints = pool.pool.start_loading(list(zip(workers, loads, strict=True)))
    following = [*zip(endpoints[1:], keys[2:], strict=True), (receiver.endpoint, pool.pool.own_key)]
    for worker, (next, key) in zip(workers, following, strict=True):
        pool.pool.send(worker, Connect(fence, next, key))
    pool.pool.wait_until_loaded(workers, on_loading=lambda _: None)
    client_auth = edges.client_auth(endpoints[0], keys[1])
    sender = ZmqSender(context, endpoints[0], limits, name="the bench", prepare=client_auth)
    try:
        yield DrivenRing(pool, workers, fence, sender, receiver)
    finally:
        sender.close()
        receiver.close()
        edges.close()
        context.destroy(0)
