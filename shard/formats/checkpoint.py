"""A checkpoint is what a loader needs from a model's files, whatever their format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from shard.formats.affine import AffineForm, AffineRows
from shard.formats.dtypes import check_output
from shard.formats.spec import ModelSpec
from transport.messages.ring import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A tensor under its Hugging Face name. `format` is a safetensors dtype ("BF16"), a GGUF type ("Q4_1"), or names
    another quantization ("MLX 4-bit"). `affine` is the quantized form it can be read in, None for a dense one."""

    name: str
    shape: tuple[int, ...]
    format: str
    file_bytes: int
    affine: AffineForm | None = None


class Checkpoint(Protocol):
    """A model on disk. `config` is the Hugging Face config.json (derived, for a GGUF)."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read_into(self, name: str, out: np.ndarray, dtype: DType) -> None:
        """Fill `out` (C-contiguous, the tensor's shape; float32, float16, or uint16 for bfloat16 bits) from the file.

        Reads only this tensor's bytes, in blocks of rows, without a second copy of the whole, and leaves no file pages
        mapped. Raises BadCheckpoint for a missing, truncated or corrupt tensor.
        """

    def read_rows(self, name: str, first: int, out: np.ndarray, dtype: DType) -> None:
        """As `read_into`, for rows [first, first + len(out)) of the tensor seen as a matrix [rows, columns]."""

    def read_affine(self, name: str, first: int, num_rows: int) -> AffineRows:
        """Rows [first, first + num_rows) of a tensor whose `affine` is not None, seen as a matrix [rows, columns].

        Several threads may read at once. Raises BadCheckpoint.
        """

    def close(self) -> None: ...


def matrix_rows(shape: tuple[int, ...]) -> int:
    """Rows of the tensor as a matrix [rows, columns]: all its axes but the last. A vector is one row."""
    return math.prod(shape[:-1])


def check_rows(name: str, shape: tuple[int, ...], first: int, num_rows: int) -> None:
    """Raise ValueError unless the tensor `name` has rows [first, first + num_rows)."""
    if not shape or not 0 <= first <= first + num_rows <= matrix_rows(shape):
        raise ValueError(f"{name} {shape} has no rows [{first}, {first + num_rows})")


def check_read(info: TensorInfo, first: int, out: np.ndarray, dtype: DType) -> None:
    """Raise ValueError unless `out` can take rows of the tensor from `first` on as `dtype`."""
    check_rows(info.name, info.shape, first, len(out))
    check_output(info.name, (len(out), info.shape[-1]), out, dtype)


def require_affine(info: TensorInfo) -> AffineForm:
    """The form in which the tensor is read. Raises ValueError for a dense one."""
    if info.affine is None:
        raise ValueError(f"{info.name} is not quantized")
    return info.affine
