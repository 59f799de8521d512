"""A decode step as one native call gives the very numbers of its layers called one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shard.stage import Batch
from shard.torch_backend.lean.cpu_program import MOST_ROWS, CpuPrograms
from shard.torch_backend.lean.shard import LeanShard
from tests.shard.ring import load_stage, random_prompts, run_step, tiny_spec
from tests.shard.tiny import NUM_LAYERS, MemoryCheckpoint, quantized_checkpoint, tiny_model
from transport.messages import Entry, SequenceId

NATIVE = ("llama", "llama_tied", "mistral", "qwen3", "smollm3", "phi3", "gemma2", "gemma3_text")
"""Families without biases in their projections, or multipliers. Gemma has norms after its blocks too."""
BY_LAYERS = ("qwen2", "granite", "olmo2", "mixtral")


def stage(checkpoint: MemoryCheckpoint, dtype: str = "float32") -> LeanShard:
    fields = {"compute_dtype": dtype, "wire_dtype": dtype, "next_dtype": dtype}
    made = load_stage(checkpoint, tiny_spec(0, NUM_LAYERS, **fields), "lean")
    assert isinstance(made, LeanShard)
    return made


def without_programs(shard: LeanShard) -> LeanShard:
    shard._programs = None
    return shard


def decode(shard: LeanShard, prompts: dict[SequenceId, list[int]], num_tokens: int) -> list[np.ndarray]:
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
    assert list(shard._programs._made) == [(3, torch.get_num_threads())]


def test_a_step_s_hidden_states_stay_when_the_next_is_run(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tiny_model("llama", 2), tmp_path)
    first = load_stage(checkpoint, tiny_spec(0, 2), "lean")
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
    prompts = random_prompts(5, [30] * (MOST_ROWS + 1))
    shard, plain = stage(checkpoint), without_programs(stage(checkpoint))
    for one in (shard, plain):
        run_step([one], [Entry(s, 0, tuple(i[:9]), 1) for s, i in prompts.items()])
    before = torch.get_num_threads()
    at = dict.fromkeys(prompts, 9)
    try:
        for step, count in enumerate((1, 4, 4, MOST_ROWS, MOST_ROWS + 1, 2, 4)):
            torch.set_num_threads(1 + step % 2)
            entries = [Entry(s, at[s], (prompts[s][at[s]],), 1) for s in list(prompts)[step % 3 :][:count]]
            for entry in entries:
                at[entry.sequence] += 1
            assert np.array_equal(run_step([shard], entries), run_step([plain], entries))
            if step == 3:
                for one in (shard, plain):
                    one.truncate(SequenceId(2), 10)
                at[SequenceId(2)] = 10
    finally:
        torch.set_num_threads(before)
