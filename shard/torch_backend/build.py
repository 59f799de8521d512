"""Loads a stage on torch: by the fused path, or the library's empty module with each tensor read into its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from shard.formats.checkpoint import Checkpoint
from shard.formats.families import has_stacked_experts, why_not_fused
from shard.stage import StageSpec
from shard.torch_backend.fused.build import build_fused
from shard.torch_backend.fused.shard import FusedShard
from shard.torch_backend.library.shard import LibraryShard, build_library
from transport.errors import ConfigError, UnsupportedModel

TorchPath = Literal["auto", "library", "fused"]


def build_torch_shard(
    checkpoint: Checkpoint, spec: StageSpec, progress: Callable[[int, int], None], *, path: TorchPath = "auto"
) -> LibraryShard | FusedShard:
    """Layers [first, last) on spec.device, by the fused path where it runs this model ("auto"), or as requested.

    `progress(read_bytes, total_bytes)` counts bytes of the stage's files. Reads the stage's own
    tensors only; never holds two copies of more than one tensor. Raises BadCheckpoint, UnsupportedModel, DoesNotFit,
    ConfigError.
    """
    device = _device(spec.device)
    reason = why_not_fused(checkpoint.config, stacked_experts=has_stacked_experts(checkpoint.tensors))
    if path == "fused" and reason is not None:
        raise UnsupportedModel(reason, hint="the library path may run it")
    is_fused = path == "fused" or (path == "auto" and reason is None)
    if spec.kv != "full" and (device.type != "cpu" or not is_fused):
        raise UnsupportedModel(
            f"KV can't be held in 8 bits on {spec.device}"
            + ("" if is_fused else f", where transformers runs this model: {reason or 'it was asked to'}"),
            hint="leave --kv-cache out",
        )
    if is_fused:
        return build_fused(checkpoint, spec, device, progress)
    return build_library(checkpoint, spec, device, progress)


def _device(name: str) -> torch.device:
    """Raises ConfigError for a device that torch can't use here."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"torch can't use the device {name} here: {error}", hint="use cpu, cuda:0 or mps") from error
    return device
