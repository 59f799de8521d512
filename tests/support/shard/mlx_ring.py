"""Tiny models are split over MLX shards, for the tests of that backend."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shard.mlx_backend.build import build_mlx_shard
from shard.mlx_backend.shard import MlxShard
from shard.stage import Batch, StageSpec
from tests.support.shard import tiny
from transport.messages.ring import DType, Entry, SequenceId


def shard_spec(first: int, last: int, *, dtype: DType = "float32", wire: DType = "float32") -> StageSpec:
    return StageSpec(
        first=first,
        last=last,
        num_layers=tiny.NUM_LAYERS,
        device="mlx:cpu",
        compute_dtype=dtype,
        wire_dtype=wire,
        next_dtype=wire,
        context_tokens=256,
        kv_capacity_tokens=4096,
    )


def checkpoint_of(family: str, folder: Path, seed: int = 0) -> tuple[Any, tiny.MemoryCheckpoint]:
    """The transformers model and its tensors."""
    model = tiny.tiny_model(family, seed)
    return model, tiny.memory_checkpoint(model, folder)


class Ring:
    """MLX shards in a row, fed by hand; checks nothing."""

    def __init__(
        self,
        checkpoint: tiny.MemoryCheckpoint,
        cuts: Sequence[int] = (),
        *,
        dtype: DType = "float32",
        wire: DType = "float32",
    ) -> None:
        self.shards: list[MlxShard] = [
            build_mlx_shard(checkpoint, shard_spec(first, last, dtype=dtype, wire=wire))
            for first, last in itertools.pairwise([0, *cuts, tiny.NUM_LAYERS])
        ]

    def step(self, *chunks: tuple[int, int, Sequence[int]]) -> np.ndarray:
        """Chunks of (sequence, start, ids) as one step; logits of every token, one chunk after another."""
        entries = tuple(
            Entry(sequence=SequenceId(sequence), start=start, token_ids=tuple(ids), num_logits=len(ids))
            for sequence, start, ids in chunks
        )
        hidden: np.ndarray | None = None
        for shard in self.shards:
            hidden = shard.forward(Batch(entries=entries, hidden=hidden))
        assert hidden is not None
        return hidden


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    """max |difference| / max |wanted|."""
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())
