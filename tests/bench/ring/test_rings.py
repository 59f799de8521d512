"""Rings to measure are real ones: two worker processes, with the engine's process before them and without it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.ring.driven_ring import driven_ring
from bench.ring.engine_ring import BenchPool, EngineRing, PendingRequest, engine_ring, pool_of_processes
from bench.ring.sections import Prompts, run_steadily, run_streams
from planner.plan import Plan
from potluck.engine.tokenizer import Tokenizer
from potluck.store.manifest import StoredModel
from potluck.store.store import Store
from potluck.system.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPool:
    pool: BenchPool
    model: StoredModel
    plan: Plan


@pytest.fixture(scope="module")
def prompts(smollm2_path: Path) -> Prompts:
    return Prompts(Tokenizer(smollm2_path), 49152)


@pytest.fixture(scope="module")
def planned(smollm2_path: Path) -> Iterator[PlannedPool]:
    model = Store(smollm2_path.parents[1]).show("smollm2")
    settings = Settings(context=4096, estimate=True, layers="cpu-1=17,cpu-2=13")
    with pool_of_processes(2) as pool:
        yield PlannedPool(pool=pool, model=model, plan=pool.plan(model, settings))


@pytest.fixture(scope="class")
def ring(planned: PlannedPool, prompts: Prompts) -> Iterator[EngineRing]:
    """Its stages leave with the class: the driven ring loads the same workers."""
    with engine_ring("ring", planned.pool, planned.model, planned.plan, prompts.eos_ids) as ring:
        yield ring


class TestEngineRing:
    def test_streams_are_counted_by_the_stages(self, ring: EngineRing, prompts: Prompts) -> None:
        """The rate is this client's view, 0 if it was too busy to see both chats at once: see test_summary."""
        assert [stage.num_layers for stage in ring.plan.stages] == [17, 13]
        _, steps = run_streams(ring, prompts, 2, 64)
        assert len(steps) == 2
        assert all(1 <= step.rows <= 2 and step.seconds > 0 for step in steps)

    def test_chats_that_go_on_are_measured(self, ring: EngineRing, prompts: Prompts) -> None:
        def until_eight_tokens_more(chats: list[PendingRequest]) -> None:
            enough = ring.stats()[-1].decode_tokens + 8
            ring.client.wait(lambda: ring.stats()[-1].decode_tokens >= enough)

        rate, steps = run_steadily(ring, prompts, 2, until_eight_tokens_more)
        assert rate > 0 and len(steps) == 2

    def test_chats_that_end_too_soon_are_an_error(self, ring: EngineRing, prompts: Prompts) -> None:
        def until_all_are_over(chats: list[PendingRequest]) -> None:
            ring.client.wait(lambda: all(chat.is_over for chat in chats))

        with pytest.raises(RuntimeError, match="2 of 2 chats ended"):
            run_steadily(ring, prompts, 2, until_all_are_over, most_tokens=4)

    def test_one_of_two_requests_is_cancelled(self, ring: EngineRing, prompts: Prompts) -> None:
        client = ring.client
        asked = [client.start(ring.request(3500, text=text)) for text in prompts.texts(2, 64)]
        client.wait(lambda: all(one.chunks_s for one in asked))
        client.cancel(asked[0])
        client.wait(lambda: asked[0].is_over)
        assert asked[0].finished is None and not asked[1].is_over
        client.cancel(asked[1])
        client.wait(lambda: asked[1].is_over)

    def test_a_prompt_beyond_the_context_is_an_error(self, ring: EngineRing, prompts: Prompts) -> None:
        with pytest.raises(RuntimeError, match="4096"):
            ring.run_requests([ring.request(1, ids=prompts.ids(5000))])


def test_steps_are_driven_without_an_engine(planned: PlannedPool, prompts: Prompts) -> None:
    pool, plan = planned.pool, planned.plan
    with driven_ring(pool, planned.model, plan, max_step_tokens=600) as driven:
        found = driven.decode(2, 3, prompts=[prompts.ids(8) for _ in range(6)], steps=8)
        assert len(found.stage_s) == 2 and 0 < sum(found.stage_s) < found.round_trip_s
        # Nothing of it stays on the stages.
        assert [stats.sequences for stats in pool.stats(pool.workers_of(plan))] == [0, 0]
