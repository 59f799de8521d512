"""Rings to measure are real ones: two worker processes, with the engine's process before them and without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.ring.driven_ring import driven_ring
from bench.ring.engine_ring import engine_ring, pool_of_processes
from bench.ring.sections import Prompts, run_steadily, run_streams
from potluck.engine.tokenizer import Tokenizer
from potluck.store.store import Store
from potluck.system.settings import Settings


@pytest.fixture
def prompts(smollm2_path: Path) -> Prompts:
    return Prompts(Tokenizer(smollm2_path), 49152)


def test_two_workers_serve_an_engine_and_then_steps_without_one(smollm2_path: Path, prompts: Prompts) -> None:
    model = Store(smollm2_path.parents[1]).show("smollm2")
    settings = Settings(context=4096, estimate=True, layers="cpu-1=17,cpu-2=13")
    with pool_of_processes(2) as pool:
        plan = pool.plan(model, settings)
        assert [stage.num_layers for stage in plan.stages] == [17, 13]
        with engine_ring("ring", pool, model, plan, prompts.eos_ids) as ring:
            rate, steps = run_streams(ring, prompts, 2, 64)
            assert rate > 0 and len(steps) == 2 and all(1 <= step.rows <= 2 and step.seconds > 0 for step in steps)
            rate, steps = run_steadily(ring, prompts, 2, seconds=0.5)
            assert rate > 0 and len(steps) == 2
            with pytest.raises(RuntimeError, match="2 of 2 chats ended"):
                run_steadily(ring, prompts, 2, seconds=2.0, most_tokens=4)
            asked = [ring.client.start(ring.request(1500, text=text)) for text in prompts.texts(2, 64)]
            ring.client.wait(lambda: all(one.chunks_s for one in asked))
            ring.client.cancel(asked[0])
            ring.client.wait(lambda: asked[0].is_over, 30.0)
            assert asked[0].finished is None and not asked[1].is_over
            ring.client.cancel(asked[1])
            ring.client.wait(lambda: asked[1].is_over, 30.0)
            with pytest.raises(RuntimeError, match="4096"):
                ring.run_requests([ring.request(1, ids=prompts.ids(5000))])
        with driven_ring(pool, model, plan, max_step_tokens=600) as driven:
            found = driven.decode(2, 3, prompts=[prompts.ids(8) for _ in range(6)], steps=8)
            assert len(found.stage_s) == 2 and sum(found.stage_s) < found.round_trip_s < 10.0
            # Nothing of it stays on the stages.
            assert [stats.sequences for stats in pool.stats(pool.workers_of(plan))] == [0, 0]
