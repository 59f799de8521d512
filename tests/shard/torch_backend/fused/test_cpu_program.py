"""Steps as native calls give the very numbers of their layers called one by one, whoever shares a step."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shard.stage import Batch
from shard.torch_backend.fused.cpu_program import MAX_DECODE_ROWS, CpuPrograms
from shard.torch_backend.fused.shard import FusedShard
from shard.torch_backend.fused.step import SLICE_TOKENS
from tests.support.shard.stage_runner import load_stage, random_prompts, run_step, tiny_spec
from tests.support.shard.tiny import NUM_LAYERS, MemoryCheckpoint, quantized_checkpoint, tiny_model
from transport.messages.ring import Entry, SequenceId

NATIVE = ("llama", "llama_tied", "mistral", "qwen3", "smollm3", "phi3", "gemma2", "gemma3_text")
"""Families without biases in their projections, or multipliers. Gemma has norms after its blocks too."""
BY_LAYERS = ("qwen2", "granite", "olmo2", "mixtral")


def stage(checkpoint: MemoryCheckpoint, dtype: str = "float32", **changes: int) -> FusedShard:
    fields: dict[str, Any] = {"compute_dtype": dtype, "wire_dtype": dtype, "next_dtype": dtype, **changes}
    made = load_stage(checkpoint, tiny_spec(0, NUM_LAYERS, **fields), "fused")
    assert isinstance(made, FusedShard)
    return made


def without_programs(shard: FusedShard) -> FusedShard:
    shard._programs = None
    return shard


def decode(shard: FusedShard, prompts: dict[SequenceId, list[int]], num_tokens: int) -> list[np.ndarray]:
    """Prompts all at once, then a token of each a step, for all that are left of them."""
    begin = [Entry(s, 0, tuple(ids[:-num_tokens]), 1) for s, ids in prompts.items()]
    found = [run_step([shard], begin)]
    for left in range(num_tokens, 0, -1):
        entries = [Entry(s, len(ids) - left, (ids[-left],), 1) for s, ids in prompts.items()]
        found.append(run_step([shard], entries))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", NATIVE)
def test_a_program_is_its_layers(family: str, dtype: str, tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tiny_model(family, 2), tmp_path)
    prompts = random_prompts(3, [40, 33, 29])
    shard = stage(checkpoint, dtype)
    assert isinstance(shard._programs, CpuPrograms)
    got, wanted = decode(shard, prompts, 12), decode(without_programs(stage(checkpoint, dtype)), prompts, 12)
    for step, (one, other) in enumerate(zip(got, wanted, strict=True)):
        assert np.array_equal(one, other), step
    threads = torch.get_num_threads()
    assert list(shard._programs._made) == [("PrefillProgram", SLICE_TOKENS, threads), ("DecodeProgram", 3, threads)]


@pytest.mark.parametrize("family", NATIVE)
def test_a_mixed_step_is_its_parts(family: str, tmp_path: Path) -> None:
    """Decodes, an ending and a middle chunk, in any order, and the same without programs."""
    checkpoint = quantized_checkpoint(tiny_model(family, 2), tmp_path)
    prompts = random_prompts(4, [40, 33, 60, 50])
    one, two, three, four = prompts
    mixed, apart, plain = stage(checkpoint), stage(checkpoint), without_programs(stage(checkpoint))
    for shard in (mixed, apart, plain):
        run_step([shard], [Entry(s, 0, tuple(prompts[s][:20]), 1) for s in (one, two, three)])
    for step in range(5):
        at = 20 + step
        entries = [
            Entry(three, 20 + 7 * step, tuple(prompts[three][20 + 7 * step : 27 + 7 * step]), step),
            Entry(one, at, (prompts[one][at],), 1),
            Entry(four, 10 * step, tuple(prompts[four][10 * step : 10 * step + 10]), 1),
            Entry(two, at, (prompts[two][at],), 1),
        ]
        got = run_step([mixed], entries)
        assert np.array_equal(got, np.concatenate([run_step([apart], [entry]) for entry in entries]))
        assert np.array_equal(got, run_step([plain], entries))
    assert mixed._programs is not None
    kinds = {kind for kind, _, _ in mixed._programs._made}
    assert kinds == {"DecodeProgram", "PrefillProgram"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "qwen2", "mixtral"])
def test_a_prompt_does_not_depend_on_how_it_is_cut(family: str, dtype: str, tmp_path: Path) -> None:
    """To the bit, with programs and (qwen2, mixtral) without: also where a chunk is longer than what is taken at once,
    or than what a sliding window keeps free."""
    checkpoint = quantized_checkpoint(tiny_model(family, 2), tmp_path)
    checkpoint.config["max_position_embeddings"] = 1024
    length = 2 * SLICE_TOKENS + 60
    ids = random_prompts(6, [length])[SequenceId(1)]
    found = []
    for bounds in ((0, length), (0, 2, 9, 137, 139, length), (*range(0, length - 40, 40), length)):
        shard = stage(checkpoint, dtype, context_tokens=1024)
        rows = [
            run_step([shard], [Entry(SequenceId(1), start, tuple(ids[start:end]), end - start)])
            for start, end in pairwise(bounds)
        ]
        found.append(np.concatenate(rows))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_a_step_s_hidden_states_stay_when_the_next_is_run(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tiny_model("llama", 2), tmp_path)
    first = load_stage(checkpoint, tiny_spec(0, 2), "fused")
    steps = [(Entry(SequenceId(1), at, (token,), 1),) for at, token in enumerate((5, 6, 7))]
    found = [first.forward(Batch(entries=entries, hidden=None)) for entries in steps]
    kept = [hidden.copy() for hidden in found]
    first.forward(Batch(entries=(Entry(SequenceId(1), 3, (8,), 1),), hidden=None))
    assert all(np.array_equal(one, other) for one, other in zip(found, kept, strict=True))
    assert not np.array_equal(found[0], found[1])


@pytest.mark.parametrize("family", BY_LAYERS)
def test_what_is_not_all_native_goes_by_layers(family: str, tmp_path: Path) -> None:
    assert stage(quantized_checkpoint(tiny_model(family, 2), tmp_path))._programs is None


def test_sequences_come_and_go_and_threads_change(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tiny_model("llama", 2), tmp_path)
    prompts = random_prompts(5, [30] * (MAX_DECODE_ROWS + 1))
    shard, plain = stage(checkpoint), without_programs(stage(checkpoint))
    for one in (shard, plain):
        run_step([one], [Entry(s, 0, tuple(i[:9]), 1) for s, i in prompts.items()])
    before = torch.get_num_threads()
    at = dict.fromkeys(prompts, 9)
    try:
        for step, count in enumerate((1, 4, 4, MAX_DECODE_ROWS, MAX_DECODE_ROWS + 1, 2, 4)):
            torch.set_num_threads(1 + step % 2)
            entries = [Entry(s, at[s], (prompts[s][at[s]],), 1) for s in list(prompts)[step % 3 :][:count]]
            for entry in entries:
                at[entry.sequence] += 1
            assert np.array_equal(run_step([shard], entries), run_step([plain], entries))
            if step == 3:
                for one in (shard, plain):
                    one.kv.truncate(SequenceId(2), 10)
                at[SequenceId(2)] = 10
    finally:
        torch.set_num_threads(before)
