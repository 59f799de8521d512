"""Loads a stage on torch: by the fused path, or the library's empty module with each tensor read into its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from shard.formats.checkpoint import Checkpoint
from shard.formats.families import has_stacked_experts, why_not_fused
from shard.stage import StageSpec
from shard.torch_backend.fused.build import build_fused
from shard.torch_backend.fused.shard import FusedShard
from shard.torch_backend.library.shard import LibraryShard, build_empty_model
from shard.torch_backend.memory import translate_load_oom
from shard.torch_backend.tensors import (
    NUMPY_DTYPES,
    TensorNames,
    TensorPart,
    read_part,
    to_numpy,
    to_torch,
    total_file_bytes,
)
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
    return _build_library(checkpoint, spec, device, progress)


def _build_library(
    checkpoint: Checkpoint, spec: StageSpec, device: torch.device, progress: Callable[[int, int], None]
) -> LibraryShard:
    model, tied = build_empty_model(checkpoint.config, spec)
    names = TensorNames(checkpoint.tensors, first=spec.first, tied_embeddings=tied)
    share_embedding = tied and spec.is_first and spec.is_last
    # All names and shapes are checked before the first byte is read: a wrong checkpoint fails at once.
    parts_of: dict[str, tuple[TensorPart, ...]] = {
        name: names.parts(name, tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if not (share_embedding and name == "lm_head.weight")
    }
    total_bytes = total_file_bytes(checkpoint.tensors, (part for parts in parts_of.values() for part in parts))
    reader = _ParameterReader(checkpoint, spec, device)
    read_bytes = weights_bytes = 0
    progress(0, total_bytes)
    for name, parts in parts_of.items():
        with translate_load_oom(name, spec.device):
            parameter = torch.empty_like(model.get_parameter(name), device=device, requires_grad=False)
            for part in parts:
                reader.read(part, parameter)
                read_bytes += checkpoint.tensors[part.name].file_bytes
                progress(read_bytes, total_bytes)
        _set_parameter(model, name, parameter)
        weights_bytes += parameter.nbytes
    if share_embedding:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.to(device)  # The buffers: rotary frequencies and scales.
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"parameters without weights: {left}"
    return LibraryShard(model, spec, weights_bytes)


class _ParameterReader:
    """Reads parts into parameters: on the CPU directly, elsewhere by way of one host buffer that is used again."""

    def __init__(self, checkpoint: Checkpoint, spec: StageSpec, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._dtype = spec.compute_dtype
        self._device = device
        self._buffer = np.empty(0, dtype=NUMPY_DTYPES[spec.compute_dtype])

    def read(self, part: TensorPart, parameter: torch.Tensor) -> None:
        if self._device.type == "cpu":
            read_part(self._checkpoint, part, to_numpy(parameter), self._dtype)
            return
        size = int(np.prod(part.shape))
        if self._buffer.size < size:
            self._buffer = np.empty(0, dtype=self._buffer.dtype)  # Freed before the larger one is allocated.
            self._buffer = np.empty(size, dtype=self._buffer.dtype)
        host = self._buffer[:size].reshape(part.shape)
        self._checkpoint.read_into(part.name, host, self._dtype)
        parameter[part.index].copy_(to_torch(host, self._dtype))


def _device(name: str) -> torch.device:
    """Raises ConfigError for a device that torch can't use here."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"torch can't use the device {name} here: {error}", hint="use cpu, cuda:0 or mps") from error
    return device


def _set_parameter(model: Any, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))
