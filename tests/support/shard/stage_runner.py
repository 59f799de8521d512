"""The runner drives stages in one process, one after another, on ragged steps: any split of a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import msgspec
import numpy as np

from shard.stage import Batch, ShardBackend, StageSpec
from shard.torch_backend.build import build_torch_shard as build_torch
from shard.worker.load import load_shard
from tests.support.shard.tiny import NUM_LAYERS, VOCAB_SIZE, MemoryCheckpoint
from transport.messages.ring import Entry, SequenceId

Runner = Literal["library", "fused", "mlx"]
"""What runs a stage: one of torch's two paths, or MLX."""
Prompts = dict[SequenceId, list[int]]


def tiny_spec(first: int, last: int, **changes: Any) -> StageSpec:
    """A stage of a tiny model, all in fp32. `Any`: whatever fields a test changes."""
    fields: dict[str, Any] = {
        "first": first,
        "last": last,
        "num_layers": NUM_LAYERS,
        "device": "cpu",
        "compute_dtype": "float32",
        "wire_dtype": "float32",
        "next_dtype": "float32",
        "context_tokens": 256,
        "kv_capacity_tokens": 4096,
    }
    return StageSpec(**{**fields, **changes})


def load_stages(
    checkpoint: MemoryCheckpoint, cuts: Sequence[int], runners: Sequence[Runner] = ("library",)
) -> list[ShardBackend]:
    """Stages of the model cut at `cuts`, their runners taken in turn."""
    bounds = (0, *cuts, NUM_LAYERS)
    return [
        load_stage(checkpoint, tiny_spec(first, last), runners[index % len(runners)])
        for index, (first, last) in enumerate(pairwise(bounds))
    ]


def load_stage(checkpoint: MemoryCheckpoint, spec: StageSpec, runner: Runner) -> ShardBackend:
    if runner == "mlx":
        return load_shard(checkpoint, msgspec.structs.replace(spec, device="mlx:cpu"), backend="mlx")
    return build_torch(checkpoint, spec, lambda read_bytes, total_bytes: None, path=runner)


def run_step(stages: Sequence[ShardBackend], entries: Sequence[Entry]) -> np.ndarray:
    """The step's logits [Σ num_logits, vocab], through all stages."""
    hidden: np.ndarray | None = None
    for stage in stages:
        hidden = stage.forward(Batch(entries=tuple(entries), hidden=hidden))
    assert hidden is not None
    return hidden


def random_prompts(seed: int, lengths: Sequence[int]) -> Prompts:
    rng = np.random.default_rng(seed)
    return {SequenceId(index + 1): [int(i) for i in rng.integers(3, VOCAB_SIZE, n)] for index, n in enumerate(lengths)}


def random_steps(seed: int, prompts: Prompts) -> list[list[Entry]]:
    """Ragged steps that take every sequence from its first id to its last: chunks of a prompt, single tokens as in
    decode, and, now and then, chunks that want no logits; sequences come and go in any mix and order."""
    rng = np.random.default_rng(seed)
    done = dict.fromkeys(prompts, 0)
    steps = []
    while left := [sequence for sequence in prompts if done[sequence] < len(prompts[sequence])]:
        chosen = rng.permutation(left)[: rng.integers(1, len(left) + 1)]
        entries = []
        for sequence in (SequenceId(int(number)) for number in chosen):
            start = done[sequence]
            size = 1 if rng.random() < 0.5 else int(rng.integers(2, 17))
            ids = tuple(prompts[sequence][start : start + size])
            num_logits = 0 if rng.random() < 0.1 else len(ids)
            entries.append(Entry(sequence, start, ids, num_logits))
            done[sequence] = start + len(ids)
        steps.append(entries)
    return steps


def logits_by_position(
    stages: Sequence[ShardBackend], steps: Sequence[Sequence[Entry]]
) -> dict[tuple[SequenceId, int], np.ndarray]:
    """Every logits row that the steps asked for, under (sequence, position)."""
    found = {}
    for entries in steps:
        rows = iter(run_step(stages, entries))
        for entry in entries:
            end = entry.start + len(entry.token_ids)
            for position in range(end - entry.num_logits, end):
                found[entry.sequence, position] = next(rows)
        assert next(rows, None) is None
    return found


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    """max |difference| / max |wanted|."""
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())
