"""Tensors seen as matrices, and the ranges of their rows that may be asked for. Anything else is a caller's mistake."""

from __future__ import annotations

import math

from shard.affine import AffineForm
from shard.checkpoint import TensorInfo


def matrix_rows(shape: tuple[int, ...]) -> int:
    """Rows of the tensor as a matrix [rows, columns]: all its axes but the last. A vector is one row."""
    return math.prod(shape[:-1])


def check_rows(name: str, shape: tuple[int, ...], first: int, num_rows: int) -> None:
    """Raise ValueError unless the tensor `name` has rows [first, first + num_rows)."""
    if not shape or not 0 <= first <= first + num_rows <= matrix_rows(shape):
        raise ValueError(f"{name} {shape} has no rows [{first}, {first + num_rows})")


def form_of(info: TensorInfo) -> AffineForm:
    """The form in which the tensor is read. Raises ValueError for a dense one."""
    if info.affine is None:
        raise ValueError(f"{info.name} is not quantized")
    return info.affine
