"""The entry point of loading: a checkpoint and a spec become a running shard of the chosen backend."""

from __future__ import annotations

from collections.abc import Callable

from shard.formats.checkpoint import Checkpoint, DenseView, QuantizeOnLoad
from shard.formats.spec import QUANTIZE_ON_LOAD_BITS, Backend
from shard.stage import ShardBackend, StageSpec
from transport.errors import ConfigError
from transport.messages.ring import WeightsForm


def load_shard(
    checkpoint: Checkpoint,
    spec: StageSpec,
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
    checkpoint = in_weights_form(checkpoint, spec.weights)
    # Each library is imported only in the worker that runs on it.
    if backend == "torch":
        from shard.torch_backend.build import build_torch_shard as build_torch

        return build_torch(checkpoint, spec, progress)
    from shard.mlx_backend.build import build_mlx_shard as build_mlx

    return build_mlx(checkpoint, spec, progress)


def in_weights_form(checkpoint: Checkpoint, weights: WeightsForm) -> Checkpoint:
    """The checkpoint as a stage that holds its matrices in that form reads it."""
    if weights == "stored":
        return checkpoint
    return DenseView(checkpoint) if weights == "dense" else QuantizeOnLoad(checkpoint, QUANTIZE_ON_LOAD_BITS[weights])
