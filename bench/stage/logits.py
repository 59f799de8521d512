"""Functions that compute a window's logits, each in another way."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potluck.measure.child_process import SystemUnderTest
from shard.formats.spec import Backend
from shard.pieces.open import open_checkpoint
from shard.stage import Batch, ShardBackend, StageSpec
from shard.worker.load import load_shard
from transport.messages.ring import DType, Entry, SequenceId, WeightsForm

LogitsFunction = Callable[[list[int]], np.ndarray]

_CONTEXT_TOKENS = 2048
_ONE = SequenceId(1)


def load_whole(
    model: Path,
    dtype: DType,
    *,
    backend: Backend = "torch",
    weights: WeightsForm = "stored",
) -> ShardBackend:
    """All layers in one stage."""
    checkpoint = open_checkpoint(model)
    num_layers = checkpoint.spec.num_layers
    spec = StageSpec(
        first=0,
        last=num_layers,
        num_layers=num_layers,
        device="mlx:cpu" if backend == "mlx" else "cpu",
        compute_dtype=dtype,
        wire_dtype=dtype,
        next_dtype=dtype,
        context_tokens=_CONTEXT_TOKENS,
        kv_capacity_tokens=_CONTEXT_TOKENS,
        weights=weights,
    )
    return load_shard(checkpoint, spec, backend=backend)


def prefill(shard: ShardBackend) -> LogitsFunction:
    """The window in one step, as a prompt."""

    def logits(ids: list[int]) -> np.ndarray:
        found = shard.forward(Batch(entries=(Entry(_ONE, 0, tuple(ids), len(ids)),), hidden=None))
        shard.kv.release(_ONE)
        return found

    return logits


def token_by_token(shard: ShardBackend) -> LogitsFunction:
    """The window by decode steps."""

    def logits(ids: list[int]) -> np.ndarray:
        rows = [
            shard.forward(Batch(entries=(Entry(_ONE, start, (token,), 1),), hidden=None))
            for start, token in enumerate(ids)
        ]
        shard.kv.release(_ONE)
        return np.concatenate(rows)

    return logits


def library(model: Any) -> LogitsFunction:
    """transformers' model."""

    @torch.inference_mode()
    def logits(ids: list[int]) -> np.ndarray:
        found: np.ndarray = model(torch.tensor([ids])).logits[0].float().numpy()
        return found

    return logits


def llama(child: SystemUnderTest) -> LogitsFunction:
    """llama.cpp in a process of its own, the window as one prompt."""

    def logits(ids: list[int]) -> np.ndarray:
        with tempfile.TemporaryDirectory(prefix="potluck-quality-") as folder:
            file = Path(folder) / "logits.npy"
            child.call("logits", ids=ids, file=str(file))
            found: np.ndarray = np.load(file)
        return found

    return logits
