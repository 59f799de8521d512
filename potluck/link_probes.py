"""Links between the hosts of a pool, and within each of them, measured by their workers and by the head itself."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import zmq

from potluck.pool import Pool, PoolWorker
from transport.edges import Edges, Where
from transport.endpoints import is_host_endpoint
from transport.errors import BadMessage, PotluckError, StageFailed
from transport.link_probe import LinkEnd, LinkFigures, figures
from transport.measure_messages import (
    LinkListen,
    LinkListening,
    LinkProbe,
    LinkProbed,
    LinkShape,
    MeasureAnswer,
    MeasureQuestion,
)
from transport.messages import Fence

_SILENCE_S = 60.0
_LARGE_LOCAL = 17
_LARGE_NETWORK = 5
_numbers = itertools.count(1)


class End(Protocol):
    """A process that can be one end of a link. `key` is its host's."""

    host: str
    key: str

    def listen(self, where: Where, shape: LinkShape, upstream: str) -> str: ...

    def probe(self, next: str, key: str, *, leads: bool) -> LinkProbed: ...

    def close(self) -> None: ...


class OwnEnd:
    """This process."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: str, edges: Edges) -> None:
        self.host = host
        self.key = edges.key
        self._context = context
        self._edges = edges
        self._end: LinkEnd | None = None

    def listen(self, where: Where, shape: LinkShape, upstream: str) -> str:
        self.close()
        endpoint = self._edges.listen_at(where, f"probe-{next(_numbers)}")
        self._end = LinkEnd(self._context, endpoint, shape, guard=self._edges.guard(endpoint, upstream))
        return self._end.endpoint

    def probe(self, next: str, key: str, *, leads: bool) -> LinkProbed:
        assert self._end is not None, "an end listens first"
        try:
            return self._end.run(next, leads=leads, prepare=self._edges.towards(next, key))
        finally:
            self.close()

    def close(self) -> None:
        end, self._end = self._end, None
        if end is not None:
            end.close()


class WorkerEnd:
    """A worker of the pool. What it listens at is closed by its worker, with the probe or before the next one."""

    def __init__(self, pool: Pool, worker: PoolWorker) -> None:
        self.host = worker.register.host
        self.key = pool.key_of(worker)
        self._pool = pool
        self._worker = worker

    def listen(self, where: Where, shape: LinkShape, upstream: str) -> str:
        answer = self._ask(LinkListen(listen=where, shape=shape, upstream=upstream))
        if not isinstance(answer, LinkListening):
            raise StageFailed(f"{self._worker.register.device} answered with {type(answer).__name__}")
        if where == "network" and not is_host_endpoint(answer.endpoint):
            raise BadMessage(f"{self._worker.register.device} listens at {answer.endpoint[:80]!r}")
        return answer.endpoint

    def probe(self, next: str, key: str, *, leads: bool) -> LinkProbed:
        answer = self._ask(LinkProbe(next=next, leads=leads, key=key))
        if not isinstance(answer, LinkProbed):
            raise StageFailed(f"{self._worker.register.device} answered with {type(answer).__name__}")
        return answer

    def close(self) -> None:
        pass

    def _ask(self, question: MeasureQuestion) -> MeasureAnswer:
        (answer,) = self._pool.questions.ask([(self._worker, question)], silence_s=_SILENCE_S)
        if isinstance(answer, PotluckError):
            raise answer
        return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two ends to measure between; of two processes on one host that is the host's link to itself."""

    leader: End
    follower: End

    @property
    def where(self) -> Where:
        return "local" if self.leader.host == self.follower.host else "network"


def pairs(own: End, others: Sequence[End]) -> Iterator[Pair]:
    """Every pair of hosts once, the head's first; and every host with itself where it has two processes."""
    by_host: dict[str, list[End]] = {own.host: [own]}
    for end in others:
        by_host.setdefault(end.host, []).append(end)
    for ends in by_host.values():
        if len(ends) > 1:
            yield Pair(leader=ends[0], follower=ends[1])
    for one, other in itertools.combinations(by_host.values(), 2):
        yield Pair(leader=one[0], follower=other[0])


def measure(pair: Pair, hidden_size: int) -> tuple[LinkFigures, LinkFigures]:
    """The links from the leader to the follower and back. Raises PotluckError where they can't reach each other."""
    shape = LinkShape(
        fence=Fence(secrets.token_hex(8), 0, "probe"),
        hidden_size=hidden_size,
        dtype="bfloat16",
        num_large=_LARGE_LOCAL if pair.where == "local" else _LARGE_NETWORK,
    )
    ends = (pair.leader, pair.follower)
    try:
        at_leader, at_follower = (
            end.listen(pair.where, shape, other.key) for end, other in zip(ends, reversed(ends), strict=True)
        )
        with ThreadPoolExecutor(max_workers=2) as threads:
            leading = threads.submit(pair.leader.probe, at_follower, pair.follower.key, leads=True)
            following = threads.submit(pair.follower.probe, at_leader, pair.leader.key, leads=False)
            return figures(*_results((leading.result, following.result)))
    finally:
        for end in ends:
            end.close()


def _results(waits: Sequence[Callable[[], LinkProbed]]) -> list[LinkProbed]:
    return [wait() for wait in waits]
