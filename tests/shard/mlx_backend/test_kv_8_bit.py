"""KV in 8 bits on MLX: half the memory, a small error, the same rules for windows, forks and truncation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx
import transformers

from shard.mlx_backend.build import build_mlx_shard
from shard.mlx_backend.kv import MlxLayerKV, kv_group_size
from shard.mlx_backend.shard import MlxShard
from tests.support.shard.stage_runner import random_prompts, relative_error, run_step, tiny_spec
from tests.support.shard.tiny import MemoryCheckpoint, memory_checkpoint, tiny_config, tiny_model
from transport.errors import UnsupportedModel
from transport.messages.ring import Entry, SequenceId

ONE, TWO, THREE = SequenceId(1), SequenceId(2), SequenceId(3)
HEAD_DIM = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MemoryCheckpoint:
    config = tiny_config("gemma3_text")
    config.head_dim = HEAD_DIM
    transformers.set_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(parameter.data.new_empty(parameter.shape).normal_(0, 0.15))
    found = memory_checkpoint(model, tmp_path_factory.mktemp("wide"))
    spec = replace(found.spec, head_dim=HEAD_DIM)
    return MemoryCheckpoint(spec=spec, config=found.config, arrays=found.arrays)


def shard_of(checkpoint: MemoryCheckpoint, kv: str) -> MlxShard:
    return build_mlx_shard(checkpoint, tiny_spec(0, 4, device="mlx:cpu", kv=kv, context_tokens=1024))


def feed(shard: MlxShard, sequence: SequenceId, ids: list[int], *ends: int, start: int = 0) -> np.ndarray:
    """Logits of all chunks that end at `ends`."""
    rows = []
    for end in ends:
        rows.append(run_step([shard], [Entry(sequence, start, tuple(ids[start:end]), end - start)]))
        start = end
    return np.concatenate(rows)


def test_logits_are_near_those_of_full_kv(checkpoint: MemoryCheckpoint) -> None:
    (ids,) = random_prompts(3, [320]).values()
    full, eight = shard_of(checkpoint, "full"), shard_of(checkpoint, "8-bit")
    wanted, got = (feed(shard, ONE, ids, 40, 41, 60, 320) for shard in (full, eight))
    assert 0 < relative_error(got, wanted) < 0.02
    assert eight.kv.num_bytes() == full.kv.num_bytes() * (HEAD_DIM + 8) // (4 * HEAD_DIM)
    whole = feed(shard_of(checkpoint, "8-bit"), ONE, ids, 320)
    assert relative_error(got, whole) < 2e-3, "what a token sees must not depend on how the prompt was cut"


def test_forks_and_batches_are_as_in_full_kv(checkpoint: MemoryCheckpoint) -> None:
    (ids,) = random_prompts(3, [60]).values()
    shard, fresh = shard_of(checkpoint, "8-bit"), shard_of(checkpoint, "8-bit")
    feed(shard, ONE, ids, 40)
    assert shard.kv.fork(ONE, TWO, 40)
    assert shard.kv.fork(ONE, THREE, 30)
    wanted = feed(fresh, ONE, ids, 40, 41, 60)
    # Together, of different lengths: a batch of single tokens.
    entries = [Entry(ONE, 40, (ids[40],), 1), Entry(THREE, 30, (ids[30],), 1)]
    assert relative_error(run_step([shard], entries)[0], wanted[40]) < 2e-3
    assert np.array_equal(feed(shard, TWO, ids, 41, 60, start=40), wanted[40:])
    assert shard.kv.truncate(TWO, 50) == 50
    assert relative_error(feed(shard, TWO, ids, 60, start=50), wanted[50:]) < 2e-3


@pytest.mark.parametrize("window", [None, 40])
def test_a_slot_returns_what_it_was_given_but_for_rounding(window: int | None) -> None:
    slot, rng, start = MlxLayerKV(window, 4096, group=64), np.random.default_rng(1), 0
    rows = rng.standard_normal((1, 2, 1000, 128)).astype(np.float32)
    for count in (3, 1, 300, 290, 6, 400):
        chunk = mx.array(rows[:, :, start : start + count])
        keys, values = slot.update_and_fetch(chunk, -chunk)
        start += count
        wanted = rows[:, :, start - keys.shape[2] : start]
        # A step of 255 between the least and the most: MLX shifts them a little, so that 0 stays 0.
        assert np.abs(np.array(keys) - wanted).max() <= np.ptp(rows) / 255
        assert np.abs(np.array(values) + wanted).max() <= np.ptp(rows) / 255


@pytest.mark.parametrize(("head_dim", "group"), [(256, 128), (128, 128), (64, 64), (192, 64), (96, 32), (32, 32)])
def test_groups_divide_heads(head_dim: int, group: int) -> None:
    assert kv_group_size("8-bit", head_dim) == group
    assert kv_group_size("full", head_dim) is None


@pytest.mark.parametrize("head_dim", [None, 16, 80])
def test_other_heads_are_refused_at_load(head_dim: int | None, tmp_path: Path) -> None:
    found = memory_checkpoint(tiny_model("llama", 1), tmp_path)
    changes: dict[str, Any] = {"spec": replace(found.spec, head_dim=head_dim)}
    odd = MemoryCheckpoint(config=found.config, arrays=found.arrays, **changes)
    with pytest.raises(UnsupportedModel, match="KV in 8 bits") as refusal:
        shard_of(odd, "8-bit")
    assert "--kv-cache" in refusal.value.hint
