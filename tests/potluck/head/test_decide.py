"""What a head does next, by the facts: each rule, and that a world of workers that come and go comes to rest."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck.head.decide import (
    CAUSE_GRACE_S,
    RETRY_AFTER_S,
    ChangeAddress,
    EndRing,
    Facts,
    GiveUp,
    Goal,
    LoadFailure,
    LoadRing,
    RingFacts,
    Stay,
    WaitForPeer,
    WorkerFacts,
    decide,
    root_cause,
)
from transport.errors import DoesNotFit, DownloadFailed, HostRevoked, NeighbourGone, PotluckError, RingDown

NOW_S = 1000.0
SYMPTOM = NeighbourGone("stage 1 is gone")
CAUSE = RingDown("ended by signal 9")
REVOKED = HostRevoked("beta was revoked")


def worker(name: str, *, silent_s: float = 0.0) -> WorkerFacts:
    return WorkerFacts(identity=name.encode(), device=name, last_heard_s=NOW_S - silent_s)


def identities(*names: str) -> frozenset[bytes]:
    return frozenset(name.encode() for name in names)


def ring(*errors: PotluckError, since_s: float = 0.0, **fields: Any) -> RingFacts:
    return RingFacts(
        workers=identities("a", "b"), errors=errors, first_error_s=NOW_S - since_s if errors else None, **fields
    )


def ended(*errors: PotluckError, by: PotluckError = SYMPTOM, ago_s: float = 60.0) -> RingFacts:
    return ring(*errors, since_s=ago_s, ended_with=by, ended_s=NOW_S - ago_s)


def serving(**fields: Any) -> Facts:
    facts = Facts(
        now_s=NOW_S,
        workers=(worker("a"), worker("b")),
        planned_with=identities("a", "b"),
        ring=ring(),
        has_served=True,
    )
    return replace(facts, **fields)


def failure(error: PotluckError, *names: str, ago_s: float = 0.0, had_peer: bool = False) -> LoadFailure:
    return LoadFailure(error=error, workers=identities(*names), at_s=NOW_S - ago_s, had_peer=had_peer)


def test_a_head_that_starts_plans_and_one_that_serves_stays() -> None:
    assert decide(Facts(now_s=NOW_S, workers=())) == LoadRing("")
    assert decide(serving()) == Stay()


def test_a_symptom_waits_for_its_cause_and_a_cause_for_nothing() -> None:
    assert decide(serving(ring=ring(SYMPTOM, since_s=0.1))) == Stay()
    assert decide(serving(ring=ring(SYMPTOM, since_s=CAUSE_GRACE_S))) == EndRing(SYMPTOM)
    assert decide(serving(ring=ring(SYMPTOM, CAUSE))) == EndRing(CAUSE)
    assert decide(serving(ring=ring(CAUSE, SYMPTOM, REVOKED))) == EndRing(REVOKED)
    assert root_cause(()) is None


def test_a_cause_that_comes_late_is_shown_once() -> None:
    gone = (worker("a"),)
    assert decide(serving(workers=gone, ring=ended(SYMPTOM, CAUSE))) == EndRing(CAUSE)
    assert decide(serving(workers=gone, ring=ended(SYMPTOM, CAUSE, by=CAUSE))) == Stay()
    assert decide(serving(workers=gone, ring=ended(SYMPTOM))) == Stay()


def test_newcomers_are_named_and_those_that_were_planned_with_are_none() -> None:
    three = (worker("a"), worker("b"), worker("c"))
    assert decide(serving(workers=three)) == LoadRing("c joined: loading the ring anew")
    assert decide(serving(workers=three, planned_with=identities("a", "b", "c"))) == Stay()
    assert decide(serving(workers=three, is_replan_wanted=True)) == LoadRing("c joined: loading the ring anew")


def test_a_better_plan_is_loaded_when_it_is_wanted() -> None:
    goal = decide(serving(is_replan_wanted=True))
    assert goal == LoadRing("Loading the ring by the better plan", use_better_plan=True)


def test_a_new_address_comes_after_what_is_wrong_and_before_a_load() -> None:
    moved = serving(new_address="10.0.0.2", must_reload=True)
    assert decide(moved) == ChangeAddress("10.0.0.2")
    assert decide(replace(moved, ring=ring(CAUSE))) == EndRing(CAUSE)


def test_a_revoked_host_ends_the_ring_which_is_then_loaded_without_it() -> None:
    assert decide(serving(workers=(worker("a"),), ring=ring(REVOKED))) == EndRing(REVOKED)
    after = serving(workers=(worker("a"),), ring=ended(REVOKED, by=REVOKED, ago_s=0.0), must_reload=True)
    assert isinstance(decide(after), LoadRing)


@pytest.mark.parametrize("error", [CAUSE, DoesNotFit("no"), DownloadFailed("no")])
def test_a_first_load_that_fails_ends_the_head(error: PotluckError) -> None:
    first = serving(has_served=False, ring=None, failures=(failure(error, "a", "b"),))
    assert decide(first) == GiveUp(error)


def test_a_first_load_waits_for_the_host_that_has_the_model() -> None:
    away = failure(DownloadFailed("gone"), "a", "b")
    there = replace(away, had_peer=True)
    first = serving(has_served=False, ring=None, can_wait_for_peer=True)
    assert isinstance(decide(replace(first, failures=(away, away))), WaitForPeer)
    assert isinstance(decide(replace(first, failures=(there,))), WaitForPeer)
    assert isinstance(decide(replace(first, failures=(there, away, there))), GiveUp)
    assert isinstance(decide(replace(first, failures=(failure(DoesNotFit("no")),))), GiveUp)
    assert isinstance(decide(replace(first, failures=(there,), must_reload=True)), LoadRing)


def test_a_load_that_failed_is_tried_again_when_it_may_go_better() -> None:
    lost = serving(ring=ended())
    once = replace(lost, failures=(failure(CAUSE, "a", "b"),))
    assert isinstance(decide(once), LoadRing)
    twice = replace(lost, failures=(failure(CAUSE, "a", "b"),) * 2)
    assert decide(twice) == Stay()
    assert isinstance(decide(replace(twice, workers=(worker("a"),))), LoadRing)
    assert isinstance(decide(replace(twice, now_s=NOW_S + RETRY_AFTER_S[1])), LoadRing)
    unfit = replace(lost, failures=(failure(DoesNotFit("no"), "a", "b", ago_s=1e6),))
    assert decide(unfit) == Stay()


def test_a_ring_that_was_lost_comes_back_when_all_of_its_workers_are_there() -> None:
    assert decide(serving(ring=ended(SYMPTOM, ago_s=1.0), losses_s=(NOW_S - 1,))) == Stay()
    back = serving(ring=ended(SYMPTOM, ago_s=2.0), losses_s=(NOW_S - 2,))
    assert isinstance(decide(back), LoadRing)
    assert decide(replace(back, workers=(worker("a"),))) == Stay()
    assert decide(replace(back, workers=(worker("a"), worker("b", silent_s=4.0)))) == Stay()


def test_a_ring_that_is_lost_again_and_again_comes_back_later_each_time() -> None:
    for times, after_s in enumerate((2.0, *RETRY_AFTER_S[1:], RETRY_AFTER_S[-1]), start=1):
        losses_s = (NOW_S,) * times
        assert decide(serving(ring=ended(ago_s=after_s - 0.1), losses_s=losses_s)) == Stay()
        assert isinstance(decide(serving(ring=ended(ago_s=after_s), losses_s=losses_s)), LoadRing)


@dataclass
class World:
    """Workers, and a ring over all of them; what the controller does, in few lines. A load fails where a worker is
    silent, or `bad` is there."""

    now_s: float = 0.0
    heard_s: dict[str, float] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    num_made: int = 0
    facts: Facts = field(default_factory=lambda: Facts(now_s=0.0, workers=(), has_served=True))

    def look(self) -> Facts:
        for name in self.heard_s.keys() - self.silent:
            self.heard_s[name] = self.now_s
        for name in [name for name, heard_s in self.heard_s.items() if self.now_s - heard_s > 10.0]:
            self.go(name)
        workers = tuple(
            WorkerFacts(identity=name.encode(), device=name, last_heard_s=heard_s)
            for name, heard_s in sorted(self.heard_s.items())
        )
        self.facts = replace(self.facts, now_s=self.now_s, workers=workers)
        return self.facts

    def come(self) -> None:
        self.num_made += 1
        self.heard_s[f"w{self.num_made}"] = self.now_s

    def go(self, name: str) -> None:
        del self.heard_s[name]
        self.silent.discard(name)
        self.fail(CAUSE, {name.encode()})

    def fail(self, error: PotluckError, of: set[bytes]) -> None:
        ring = self.facts.ring
        if ring is not None and ring.workers & of:
            first_s = self.now_s if ring.first_error_s is None else ring.first_error_s
            self.facts = replace(self.facts, ring=replace(ring, errors=(*ring.errors, error), first_error_s=first_s))

    def apply(self, goal: Goal) -> None:
        facts = self.facts
        match goal:
            case EndRing(error):
                assert facts.ring is not None
                was_served = facts.ring.ended_with is None
                self.facts = replace(
                    facts,
                    ring=replace(
                        facts.ring,
                        ended_with=error,
                        ended_s=self.now_s if was_served else facts.ring.ended_s,
                    ),
                    losses_s=(*facts.losses_s, self.now_s) if was_served else facts.losses_s,
                )
            case LoadRing():
                there = facts.identities
                is_good = bool(there) and not self.silent
                failed = LoadFailure(error=CAUSE, workers=there, at_s=self.now_s)
                self.facts = replace(
                    facts,
                    planned_with=there,
                    must_reload=False,
                    failures=() if is_good else (*facts.failures, failed),
                    ring=RingFacts(
                        workers=there, ended_with=None if is_good else CAUSE, ended_s=self.now_s, first_error_s=None
                    ),
                )
            case _:
                raise AssertionError(goal)

    def settle(self) -> None:
        """Until there is nothing to do now."""
        for _ in range(10):
            goal = decide(self.look())
            if isinstance(goal, Stay):
                return
            before = self.facts
            self.apply(goal)
            assert self.facts != before
        raise AssertionError("it does not come to rest")

    @property
    def serves(self) -> bool:
        ring = self.facts.ring
        return ring is not None and ring.ended_with is None and not ring.errors


@given(st.lists(st.tuples(st.sampled_from(["come", "go", "stop", "wake", "link", "wait"]), st.integers(0, 5))))
def test_whatever_happens_it_rests_and_serves_again_once_all_is_well(events: list[tuple[str, int]]) -> None:
    world = World()
    world.come()
    world.settle()
    for kind, number in events:
        names = sorted(world.heard_s)
        name = names[number % len(names)] if names else ""
        match kind:
            case "come":
                world.come()
            case "go" if name:
                world.go(name)
            case "stop" if name:
                world.silent.add(name)
                world.fail(SYMPTOM, {name.encode()})
            case "wake":
                world.silent.clear()
            case "link" if name:
                world.fail(SYMPTOM, {name.encode()})
            case _:
                world.now_s += number
        world.settle()
    world.silent.clear()
    missing = world.facts.ring is not None and not world.facts.ring.workers <= world.facts.identities
    for _ in range(2000):
        world.now_s += 0.5
        world.settle()
    # With a worker missing a lost ring stays down until somebody joins; everything else comes back by itself.
    assert world.serves or not world.heard_s or missing
    world.come()
    world.settle()
    assert world.serves
