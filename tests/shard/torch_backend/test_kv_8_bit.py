"""KV in 8 bits on the CPU: near to what it is in full, to the bit however a prompt is cut, half the memory, and refused
where nothing computes with it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shard.torch_backend.build import build_torch_shard
from shard.torch_backend.fused.shard import FusedShard
from shard.torch_backend.kv import ROLLBACK_TOKENS
from tests.support.shard.stage_runner import load_stage, random_prompts, relative_error, run_step, tiny_spec
from tests.support.shard.tiny import MemoryCheckpoint, memory_checkpoint, quantized_checkpoint, tiny_model
from transport.errors import UnsupportedModel
from transport.messages.ring import Entry, SequenceId

ONE, TWO = SequenceId(1), SequenceId(2)
HEAD_DIM = 16
FAMILIES = ("llama", "mistral", "gemma2", "qwen3", "qwen2")


def stage(checkpoint: MemoryCheckpoint, **changes: Any) -> FusedShard:
    made = load_stage(checkpoint, tiny_spec(0, 4, **{"kv": "8-bit", "context_tokens": 512, **changes}), "fused")
    assert isinstance(made, FusedShard)
    return made


def feed(shard: FusedShard, ids: list[int], bounds: tuple[int, ...], sequence: SequenceId = ONE) -> np.ndarray:
    return np.concatenate(
        [run_step([shard], [Entry(sequence, a, tuple(ids[a:b]), b - a)]) for a, b in pairwise(bounds)]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_near_to_kv_in_full(family: str, tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tiny_model(family, 1), tmp_path)
    ids = random_prompts(5, [60])[ONE]
    bounds = (0, 30, 45, *range(46, 61))
    full, small = stage(checkpoint, kv="full"), stage(checkpoint)
    wanted, got = feed(full, ids, bounds), feed(small, ids, bounds)
    assert 0 < relative_error(got, wanted) < 0.06
    if small._programs is not None:
        plain = stage(checkpoint)
        plain._programs = None
        assert np.array_equal(feed(plain, ids, bounds), got)


def test_it_takes_a_byte_a_number_and_a_scale_a_head(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tiny_model("llama", 1), tmp_path)
    ids = random_prompts(5, [400])[ONE]
    sizes = {}
    for kv in ("full", "8-bit"):
        shard = stage(checkpoint, kv=kv)
        feed(shard, ids, (0, 400))
        sizes[kv] = shard.kv.num_bytes()
    rows = 4 * 2 * 2 * 400  # layers, keys and values, KV heads, positions
    page = 4 * 2 * 2 * 16384
    assert rows * (HEAD_DIM + 4) <= sizes["8-bit"] < rows * (HEAD_DIM + 4) + page
    assert rows * HEAD_DIM * 4 <= sizes["full"] < rows * HEAD_DIM * 4 + page


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_prompt_does_not_depend_on_how_it_is_cut(family: str, dtype: str, tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tiny_model(family, 1), tmp_path)
    length = 2 * ROLLBACK_TOKENS + 30
    ids = random_prompts(6, [length])[ONE]
    fields = {"compute_dtype": dtype, "wire_dtype": dtype, "next_dtype": dtype}
    found = [
        feed(stage(checkpoint, **fields), ids, bounds)
        for bounds in ((0, length), (0, 3, 130, 137, length), (*range(0, length, 22), length))
    ]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_copy_and_a_way_back_go_on_as_the_whole(family: str, tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tiny_model(family, 1), tmp_path)
    ids = random_prompts(6, [90])[ONE]
    wanted = feed(stage(checkpoint), ids, (0, 50, 90))[50:]
    shard = stage(checkpoint)
    feed(shard, [*ids[:50], *[7] * 30], (0, 50, 80))
    assert shard.kv.fork(ONE, TWO, 50)
    assert shard.kv.truncate(ONE, 50) == 50
    assert np.array_equal(feed(shard, ids, (50, 90)), wanted)
    assert np.array_equal(feed(shard, ids, (50, 90), TWO), wanted)


def test_it_is_refused_where_nothing_computes_with_it(tmp_path: Path) -> None:
    def refused(checkpoint: MemoryCheckpoint, match: str, **changes: Any) -> None:
        with pytest.raises(UnsupportedModel, match=match) as raised:
            build_torch_shard(checkpoint, tiny_spec(0, 4, kv="8-bit", **changes), lambda read, total: None)
        assert raised.value.hint == "leave --kv-cache out"
        assert checkpoint.reads == {}

    refused(memory_checkpoint(tiny_model("gpt_oss", 1), tmp_path), "transformers runs this model")
    llama = memory_checkpoint(tiny_model("llama", 1), tmp_path)
    refused(llama, "on meta", device="meta")
    llama.config.update(num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    refused(llama, "heads of 8 features")
