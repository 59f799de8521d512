"""Fills the modules of a stage from a checkpoint, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from shard.checkpoint import Checkpoint
from shard.mlx_backend.arrays import MLX_DTYPE, NUMPY_DTYPE, to_mlx
from transport.errors import BadCheckpoint, UnsupportedModel
from transport.messages import DType

Progress = Callable[[int, int], None]

# Computed from the config by every class; old checkpoints store them all the same.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A module of the stage and where its tensors are: `prefix` + parameter path, or a name per expert."""

    module: Any  # an mlx.nn.Module; mypy does not see through that package
    prefix: str
    experts: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    """One parameter and the tensors it is made of: itself, or one for each row of its first axis."""

    part: Part
    path: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    stacked: bool


def fill(parts: list[Part], checkpoint: Checkpoint, dtype: DType, progress: Progress) -> int:
    """Give every parameter its values in `dtype`, evaluated, and return the bytes they take.

    Raises BadCheckpoint for a tensor that is missing or misshapen, UnsupportedModel for one without a place.
    At most one tensor is held twice at any time.
    """
    slots = [slot for part in parts for slot in _slots(part)]
    _check(slots, parts, checkpoint)
    total_bytes = sum(checkpoint.tensors[name].file_bytes for slot in slots for name in slot.sources)
    read_bytes = weights_bytes = 0
    for slot in slots:
        array = mx.zeros(slot.shape, MLX_DTYPE[dtype]) if slot.stacked else None
        for index, name in enumerate(slot.sources):
            tensor = _read(checkpoint, name, slot.shape[1:] if slot.stacked else slot.shape, dtype)
            if array is None:
                array = tensor
            else:
                array[index] = tensor
            mx.eval(array)
            read_bytes += checkpoint.tensors[name].file_bytes
            progress(read_bytes, total_bytes)
        assert array is not None
        weights_bytes += array.nbytes
        slot.part.module.load_weights([(slot.path, array)], strict=False)
    # Metal's allocator keeps freed buffers for reuse; what loading needed is of no use to decoding.
    mx.clear_cache()
    return weights_bytes


def _slots(part: Part) -> Iterator[_Slot]:
    parameters: dict[str, mx.array] = dict(tree_flatten(part.module.parameters()))
    for path, parameter in parameters.items():
        stacked = path in part.experts
        if stacked:
            names = tuple(part.prefix + part.experts[path].format(expert=i) for i in range(parameter.shape[0]))
        else:
            names = (part.prefix + path,)
        yield _Slot(part=part, path=path, shape=tuple(parameter.shape), sources=names, stacked=stacked)


def _check(slots: list[_Slot], parts: list[Part], checkpoint: Checkpoint) -> None:
    """All that can be known before reading: names and shapes, and that no tensor of these parts is left over."""
    hint = "the files are incomplete or of another model; pull it again"
    wanted: set[str] = set()
    for slot in slots:
        shape = slot.shape[1:] if slot.stacked else slot.shape
        for name in slot.sources:
            assert name not in wanted
            wanted.add(name)
            info = checkpoint.tensors.get(name)
            if info is None:
                raise BadCheckpoint(f"tensor {name} is missing", hint=hint)
            if tuple(info.shape) != shape:
                raise BadCheckpoint(f"tensor {name} has shape {tuple(info.shape)}; the config says {shape}", hint=hint)
    prefixes = tuple(part.prefix for part in parts)
    unused = (
        name
        for name in checkpoint.tensors
        if name.startswith(prefixes) and name not in wanted and not name.endswith(_IGNORED_SUFFIX)
    )
    if (leftover := next(unused, None)) is not None:
        raise UnsupportedModel(
            f"tensor {leftover} has no place in mlx-lm's model class: the output would be wrong",
            hint="run this model on torch devices only",
        )


def _read(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: DType) -> mx.array:
    buffer = np.empty(shape, NUMPY_DTYPE[dtype])
    checkpoint.read_into(name, buffer, dtype)
    array = to_mlx(buffer, dtype)
    mx.eval(array)
    return array
