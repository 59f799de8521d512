"""Views of a checkpoint in another form: its matrices quantized as they are read, or everything dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from shard.affine import AffineForm, AffineRows
from shard.affine_quantize import quantize_rows
from shard.checkpoint import Checkpoint, TensorInfo
from shard.spec import ModelSpec
from transport.errors import BadCheckpoint
from transport.messages import DType

_BLOCK_ELEMENTS = 1 << 19
# What chooses the experts decides more than it weighs: it stays as it is.
_ROUTERS = (".gate.weight", ".router.weight", ".shared_expert_gate.weight")


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the tensor is one of the matrices that quantization is for: a projection, expert, embedding or head."""
    return len(shape) == 2 and name.endswith(".weight") and not name.endswith(_ROUTERS) and "norm" not in name


def affine_form(info: TensorInfo, bits: int) -> AffineForm | None:
    """What `QuantizedOnLoad` makes of the tensor; None for one that stays dense.

    Groups of 64 where the columns allow it, as mlx-lm's: 32 would lower a matrix's rms error by a seventh and take half
    a bit more a weight, for which a finer q lowers it by a third.
    """
    if info.affine is not None:
        return info.affine
    if not is_matrix(info.name, info.shape) or info.shape[-1] % 32:
        return None
    return AffineForm(bits=bits, group=64 if info.shape[-1] % 64 == 0 else 32, exact=False)


class QuantizedOnLoad:
    """`checkpoint` with its dense matrices quantized to `bits` when they are read, block by block; what is quantized
    already stays as it is. Dense reads give the dense numbers. The caller goes on owning `checkpoint`."""

    def __init__(self, checkpoint: Checkpoint, bits: int) -> None:
        self._checkpoint = checkpoint
        self._bits = bits

    @property
    def spec(self) -> ModelSpec:
        return self._checkpoint.spec

    @property
    def config(self) -> dict[str, Any]:
        return self._checkpoint.config

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            name: replace(info, affine=affine_form(info, self._bits)) for name, info in self._checkpoint.tensors.items()
        }

    def read_into(self, name: str, out: np.ndarray, dtype: DType) -> None:
        self._checkpoint.read_into(name, out, dtype)

    def read_rows(self, name: str, first: int, out: np.ndarray, dtype: DType) -> None:
        self._checkpoint.read_rows(name, first, out, dtype)

    def read_affine(self, name: str, first: int, num_rows: int) -> AffineRows:
        inner = self._checkpoint.tensors.get(name)
        form = None if inner is None else self.tensors[name].affine
        if inner is None or inner.affine is not None or form is None:
            return self._checkpoint.read_affine(name, first, num_rows)
        columns = inner.shape[-1]
        step = max(1, _BLOCK_ELEMENTS // columns)
        buffer = np.empty((min(step, num_rows), columns), np.float32)
        made = AffineRows.empty(num_rows, columns, form.group)
        for done in range(0, num_rows, step):
            block = buffer[: num_rows - done]
            self._checkpoint.read_rows(name, first + done, block, "float32")
            rows = quantize_rows(block, form.bits, form.group)
            if not rows.fits_float16():
                raise BadCheckpoint(
                    f"{name} has numbers that are infinite, not a number or too large to quantize",
                    hint="pull the model again; if that does not help, the checkpoint itself is broken",
                )
            made.fill(done, rows)
        return made

    def close(self) -> None:
        self._checkpoint.close()


class Dense:
    """`checkpoint` as if nothing in it were quantized: every tensor is read as numbers."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    @property
    def spec(self) -> ModelSpec:
        return self._checkpoint.spec

    @property
    def config(self) -> dict[str, Any]:
        return self._checkpoint.config

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: replace(info, affine=None) for name, info in self._checkpoint.tensors.items()}

    def read_into(self, name: str, out: np.ndarray, dtype: DType) -> None:
        self._checkpoint.read_into(name, out, dtype)

    def read_rows(self, name: str, first: int, out: np.ndarray, dtype: DType) -> None:
        self._checkpoint.read_rows(name, first, out, dtype)

    def read_affine(self, name: str, first: int, num_rows: int) -> AffineRows:
        raise ValueError(f"{name} is held dense here: read its rows as numbers")

    def close(self) -> None:
        self._checkpoint.close()
