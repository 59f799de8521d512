"""A fork of KV goes on as if it had been computed, on every path, and neither it nor its source notices the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from shard.stage import ShardBackend
from tests.support.shard.stage_runner import Runner, load_stage, random_prompts, relative_error, run_step, tiny_spec
from tests.support.shard.tiny import MemoryCheckpoint, memory_checkpoint, tiny_model
from transport.errors import StageFailed
from transport.messages.ring import Entry, SequenceId

ONE, TWO, THREE = SequenceId(1), SequenceId(2), SequenceId(3)
LONG = 400
ROLLBACK = 64
"""What every path can go back by under a sliding window."""

Make = Callable[[str, Runner], ShardBackend]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, MemoryCheckpoint] = {}

    def load(family: str, runner: Runner) -> ShardBackend:
        if runner == "mlx":
            pytest.importorskip("mlx.core")
        if family not in made:
            found = memory_checkpoint(tiny_model(family, 1), tmp_path_factory.mktemp(family))
            config = {**found.config, "max_position_embeddings": 1024}
            made[family] = MemoryCheckpoint(spec=found.spec, config=config, arrays=found.arrays)
        return load_stage(made[family], tiny_spec(0, 4, context_tokens=1024), runner)

    return load


def feed(shard: ShardBackend, sequence: SequenceId, ids: list[int], *ends: int, start: int = 0) -> np.ndarray:
    """Logits of the last of the chunks that end at `ends`."""
    for end in ends:
        rows = run_step([shard], [Entry(sequence, start, tuple(ids[start:end]), end - start)])
        start = end
    return rows


every_path = pytest.mark.parametrize("runner", ["library", "fused", "mlx"])


@every_path
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_a_fork_goes_on_as_if_computed(make: Make, family: str, runner: Runner) -> None:
    ids, others = random_prompts(3, [60, 60]).values()
    others = [*ids[:25], *others[25:]]
    shard, fresh = make(family, runner), make(family, runner)
    feed(shard, ONE, ids, 25, 40)
    assert shard.kv.fork(ONE, TWO, 25)
    assert (shard.kv.length(ONE), shard.kv.length(TWO), shard.kv.num_tokens()) == (40, 25, 65)
    got = {TWO: feed(shard, TWO, others, 26, 45, start=25), ONE: feed(shard, ONE, ids, 41, 60, start=40)}
    assert np.array_equal(got[TWO], feed(fresh, TWO, others, 25, 26, 45))
    assert np.array_equal(got[ONE], feed(fresh, ONE, ids, 25, 40, 41, 60))
    # And back and on again, each on its own.
    assert (shard.kv.truncate(TWO, 30), shard.kv.truncate(ONE, 50), fresh.kv.truncate(ONE, 50)) == (30, 50, 50)
    assert np.array_equal(feed(shard, ONE, ids, 60, start=50), feed(fresh, ONE, ids, 60, start=50))
    assert relative_error(feed(shard, TWO, others, 60, start=30), feed(fresh, THREE, others, 30, 60)) < 1e-5


@every_path
def test_a_fork_inside_of_a_chunk_is_right_within_rounding(make: Make, runner: Runner) -> None:
    (ids,) = random_prompts(3, [60]).values()
    shard, fresh = make("gemma3_text", runner), make("gemma3_text", runner)
    feed(shard, ONE, ids, 40)
    assert shard.kv.fork(ONE, TWO, 33)
    assert relative_error(feed(shard, TWO, ids, 60, start=33), feed(fresh, ONE, ids, 33, 60)) < 1e-5


@every_path
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_move_leaves_nothing_behind_and_copies_nothing(make: Make, family: str, runner: Runner) -> None:
    (ids,) = random_prompts(5, [60]).values()
    shard, fresh = make(family, runner), make(family, runner)
    feed(shard, ONE, ids, 40)
    before = shard.kv.num_bytes()
    shard.kv.move(ONE, TWO)
    assert (shard.kv.length(ONE), shard.kv.length(TWO), shard.kv.num_sequences()) == (0, 40, 1)
    assert shard.kv.num_bytes() == before
    assert np.array_equal(feed(shard, TWO, ids, 60, start=40), feed(fresh, ONE, ids, 40, 60))
    assert np.array_equal(feed(shard, ONE, ids, 40), feed(fresh, TWO, ids, 40))


@every_path
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("chunk", [50, LONG])
def test_a_window_is_forked_as_far_back_as_it_reaches(make: Make, family: str, runner: Runner, chunk: int) -> None:
    (ids,) = random_prompts(7, [LONG + 20]).values()
    shard, fresh = make(family, runner), make(family, runner)
    feed(shard, ONE, ids, *range(chunk, LONG + 1, chunk))
    held = shard.kv.num_bytes()
    assert not shard.kv.fork(ONE, TWO, 20)
    assert (shard.kv.length(TWO), shard.kv.num_sequences(), shard.kv.num_bytes()) == (0, 1, held)
    length = LONG - ROLLBACK
    assert shard.kv.fork(ONE, TWO, length)
    wanted = feed(fresh, ONE, ids, length, LONG + 20)
    assert relative_error(feed(shard, TWO, ids, LONG + 20, start=length), wanted) < 1e-5
    assert relative_error(feed(shard, ONE, ids, LONG + 20, start=LONG), wanted[ROLLBACK:]) < 1e-5
    # The copy can go back like any other.
    assert shard.kv.fork(ONE, THREE, LONG)
    assert shard.kv.truncate(THREE, length) == length
    assert relative_error(feed(shard, THREE, ids, LONG + 20, start=length), wanted) < 1e-5


@every_path
def test_releasing_source_and_fork_frees_all(make: Make, runner: Runner) -> None:
    shard = make("gemma3_text", runner)
    feed(shard, ONE, [5] * 30, 30)
    assert shard.kv.fork(ONE, TWO, 30)
    assert shard.kv.num_bytes() > 0
    shard.kv.release(ONE)
    assert (shard.kv.num_sequences(), shard.kv.num_tokens()) == (1, 30)
    shard.kv.release(TWO)
    assert (shard.kv.num_sequences(), shard.kv.num_tokens(), shard.kv.num_bytes()) == (0, 0, 0)


@every_path
def test_out_of_memory_while_forking_copies_nothing(
    make: Make, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = make("llama", runner)
    feed(shard, ONE, [5] * 30, 30)

    def out_of_memory(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("can't allocate memory")

    place = "shard.mlx_backend.kv.MlxLayerKV.fork" if runner == "mlx" else "shard.torch_backend.kv.LayerKV.copy_to"
    monkeypatch.setattr(place, out_of_memory)
    with pytest.raises(StageFailed, match="memory"):
        shard.kv.fork(ONE, TWO, 20)
    assert (shard.kv.length(ONE), shard.kv.length(TWO), shard.kv.num_sequences()) == (30, 0, 1)
