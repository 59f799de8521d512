"""The entry point of loading: a checkpoint and a spec become a running shard of the chosen backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from shard.checkpoint import Checkpoint
from shard.quantize import Dense, QuantizedOnLoad
from shard.stage import ShardBackend, ShardSpec
from shard.weight_blocks import BITS_ANEW
from transport.errors import ConfigError
from transport.messages import WeightsForm

Backend = Literal["torch", "mlx"]


def load_shard(
    checkpoint: Checkpoint,
    spec: ShardSpec,
    *,
    backend: Backend,
    progress: Callable[[int, int], None] = lambda read_bytes, total_bytes: None,
) -> ShardBackend:
    """Load layers [first, last) on spec.device, reading only the stage's own tensors.

    `progress(read_bytes, total_bytes)` is called as tensors are read. Raises BadCheckpoint, UnsupportedModel,
    DoesNotFit, ConfigError.
    """
    if not 0 <= spec.first < spec.last <= spec.num_layers:
        raise ConfigError(f"layers [{spec.first}, {spec.last}) are not a run of the model's {spec.num_layers} layers")
    checkpoint = in_form(checkpoint, spec.weights)
    # Each library is imported only in the worker that runs on it.
    if backend == "torch":
        from shard.torch_backend.build import build as build_torch

        return build_torch(checkpoint, spec, progress)
    from shard.mlx_backend.build import build as build_mlx

    return build_mlx(checkpoint, spec, progress)


def in_form(checkpoint: Checkpoint, weights: WeightsForm) -> Checkpoint:
    """The checkpoint as a stage that holds its matrices in that form reads it."""
    if weights == "stored":
        return checkpoint
    return Dense(checkpoint) if weights == "dense" else QuantizedOnLoad(checkpoint, BITS_ANEW[weights])
