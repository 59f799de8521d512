"""What a head does next is decided here, from facts alone: without sockets, and with the clock given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transport.errors import DeadlineExceeded, DownloadFailed, HostRevoked, NeighbourGone, PotluckError, RingDown

CAUSE_GRACE_S = 0.5
"""A symptom is often known before its cause, which is what the user needs."""

HEARD_WITHIN_S = 3.0
_SETTLE_S = 2.0
RETRY_AFTER_S = (0.0, 5.0, 30.0, 300.0)
"""After the first, second … failure in a row, or loss within `LOSSES_COUNT_FOR_S`."""

LOSSES_COUNT_FOR_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """A worker that is registered."""

    identity: bytes
    device: str
    last_heard_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RingFacts:
    """The newest ring: its workers, what is known to be wrong with it, and with what error it was ended, if it was."""

    workers: frozenset[bytes]
    errors: tuple[PotluckError, ...] = ()
    first_error_s: float | None = None
    ended_with: PotluckError | None = None
    ended_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailure:
    """An attempt to load, with the workers that were registered when it began."""

    error: PotluckError
    workers: frozenset[bytes]
    at_s: float
    had_peer: bool = False
    """Whether the host was there that the model comes from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that a decision depends on.

    `planned_with` are the workers that were registered at the last attempt to load; None before the first. `failures`
    are those since a ring last became ready, `losses_s` when rings that served were lost of late. `must_reload` and
    `is_replan_wanted` are wishes, which the next attempt clears.
    """

    now_s: float
    workers: tuple[WorkerFacts, ...]
    planned_with: frozenset[bytes] | None = None
    ring: RingFacts | None = None
    failures: tuple[LoadFailure, ...] = ()
    losses_s: tuple[float, ...] = ()
    new_address: str | None = None
    must_reload: bool = False
    is_replan_wanted: bool = False
    has_served: bool = False
    can_wait_for_peer: bool = False

    @property
    def identities(self) -> frozenset[bytes]:
        return frozenset(worker.identity for worker in self.workers)


@dataclass(frozen=True, slots=True)
class Stay:
    """Nothing is to be done until a fact changes, or time has passed."""


@dataclass(frozen=True, slots=True)
class EndRing:
    """End the ring's requests and detach its stages; or, where that is done, show a better cause."""

    error: PotluckError


@dataclass(frozen=True, slots=True)
class LoadRing:
    """Plan and load; once nobody waits for an answer, if a ring serves."""

    why: str
    use_better_plan: bool = False


@dataclass(frozen=True, slots=True)
class ChangeAddress:
    """Go on at this host's new address."""

    address: str


@dataclass(frozen=True, slots=True)
class WaitForPeer:
    """Wait for the host that the model comes from."""

    error: PotluckError


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the head: it has never served."""

    error: PotluckError


Goal = Stay | EndRing | LoadRing | ChangeAddress | WaitForPeer | GiveUp


def decide(facts: Facts) -> Goal:
    """The one thing to do now; to be asked again once it is done."""
    ring = facts.ring
    cause = root_cause(ring.errors) if ring is not None else None
    if ring is not None and cause is not None:
        is_symptom = isinstance(cause, NeighbourGone)
        if ring.ended_with is None:
            since_s = ring.first_error_s if ring.first_error_s is not None else facts.now_s
            if not is_symptom or facts.now_s - since_s >= CAUSE_GRACE_S:
                return EndRing(cause)
        elif isinstance(ring.ended_with, NeighbourGone) and not is_symptom:
            return EndRing(cause)
    if facts.new_address is not None:
        return ChangeAddress(facts.new_address)
    if facts.failures and not facts.has_served and not facts.must_reload:
        error = facts.failures[-1].error
        is_missing = isinstance(error, DownloadFailed | RingDown)
        if facts.can_wait_for_peer and is_missing and sum(failure.had_peer for failure in facts.failures) <= 1:
            return WaitForPeer(error)
        return GiveUp(error)
    return _load_goal(facts) or Stay()


def _load_goal(facts: Facts) -> LoadRing | None:
    if facts.planned_with is None:
        return LoadRing("")
    if newcomers := [worker.device for worker in facts.workers if worker.identity not in facts.planned_with]:
        return LoadRing(f"{', '.join(newcomers)} joined: loading the ring anew")
    if facts.must_reload:
        return LoadRing("Loading the ring anew")
    ring = facts.ring
    if facts.failures:
        return LoadRing("Loading the ring anew") if _may_load_again(facts, facts.failures[-1]) else None
    if ring is not None and ring.ended_with is not None:
        return LoadRing("Loading the ring anew") if _may_come_back(facts, ring) else None
    return LoadRing("Loading the ring by the better plan", use_better_plan=True) if facts.is_replan_wanted else None


def _may_load_again(facts: Facts, failure: LoadFailure) -> bool:
    """Whether a load that has failed may go better now: with other workers, or since what was wrong may have passed."""
    if facts.identities != failure.workers:
        return True
    is_transient = isinstance(failure.error, RingDown | DeadlineExceeded)
    return is_transient and facts.now_s - failure.at_s >= _retry_after_s(len(facts.failures))


def _may_come_back(facts: Facts, ring: RingFacts) -> bool:
    """Whether a ring was lost although its workers are there: a link failed for a moment, or the engine ended."""
    heard = {worker.identity for worker in facts.workers if facts.now_s - worker.last_heard_s <= HEARD_WITHIN_S}
    after_s = max(_SETTLE_S, _retry_after_s(len(facts.losses_s)))
    return heard >= ring.workers and facts.now_s - ring.ended_s >= after_s


def _retry_after_s(times: int) -> float:
    return RETRY_AFTER_S[min(max(times, 1), len(RETRY_AFTER_S)) - 1]


def root_cause(errors: Sequence[PotluckError]) -> PotluckError | None:
    """What says most: a revoked host, then the first error that is not merely a neighbour's absence."""
    for kind in (HostRevoked, PotluckError):
        for error in errors:
            if isinstance(error, kind) and not isinstance(error, NeighbourGone):
                return error
    return errors[0] if errors else None
