"""A checkpoint whose weights are made up: what a stage's times depend on is the same, and nothing of a file is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from shard.affine import AffineRows
from shard.checkpoint import Checkpoint, TensorInfo
from shard.float_formats import NUMPY_DTYPE, check_output, store_floats
from shard.row_ranges import check_rows, form_of
from shard.spec import ModelSpec
from transport.errors import BadCheckpoint
from transport.messages import DType

# A prime: no two rows are alike, as those of a router must not be.
_DRAWN = 65_521


class Unread:
    """`checkpoint` with small random numbers of the same shapes, formats and affine forms.

    Matrices are such that activations neither vanish nor grow from layer to layer, and norms near 1: denormal or
    infinite numbers would take other times. All are made of one drawn block, again and again.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        draw = np.random.default_rng(0)
        self._normal = draw.standard_normal(_DRAWN, dtype=np.float32)
        self._bytes = draw.integers(0, 256, _DRAWN, np.uint8)
        self._blocks: dict[tuple[DType, float, float], np.ndarray] = {}

    @property
    def spec(self) -> ModelSpec:
        return self._checkpoint.spec

    @property
    def config(self) -> dict[str, Any]:
        return self._checkpoint.config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._checkpoint.tensors

    def read_into(self, name: str, out: np.ndarray, dtype: DType) -> None:
        info = self._info(name)
        check_output(name, info.shape, out, dtype)
        self._fill(info, out, dtype)

    def read_rows(self, name: str, first: int, out: np.ndarray, dtype: DType) -> None:
        info = self._info(name)
        check_rows(name, info.shape, first, len(out))
        check_output(name, (len(out), info.shape[-1]), out, dtype)
        self._fill(info, out, dtype)

    def read_affine(self, name: str, first: int, num_rows: int) -> AffineRows:
        info = self._info(name)
        form = form_of(info)
        check_rows(name, info.shape, first, num_rows)
        columns = info.shape[-1]
        rows = AffineRows.empty(num_rows, columns, form.group)
        levels = 2**form.bits - 1
        _repeat(self._bytes & levels if form.bits < 8 else self._bytes, rows.q)
        # Even over all levels, q has the deviation of levels / √12; the numbers' is to be 1 / √columns.
        rows.scales.fill(math.sqrt(12 / columns) / levels)
        rows.biases.fill(-math.sqrt(12 / columns) / 2)
        return rows

    def close(self) -> None:
        self._checkpoint.close()

    def _info(self, name: str) -> TensorInfo:
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise BadCheckpoint(f"the model has no tensor {name!r}", hint="a file is missing; pull the model again")
        return info

    def _fill(self, info: TensorInfo, out: np.ndarray, dtype: DType) -> None:
        if len(info.shape) > 1:
            mean, deviation = 0.0, 1 / math.sqrt(info.shape[-1])
        else:
            mean, deviation = (1.0 if "norm" in info.name else 0.0), 0.02
        _repeat(self._block(dtype, mean, deviation), out)

    def _block(self, dtype: DType, mean: float, deviation: float) -> np.ndarray:
        key = (dtype, mean, deviation)
        if key not in self._blocks:
            block = np.empty(_DRAWN, NUMPY_DTYPE[dtype])
            store_floats(self._normal * np.float32(deviation) + np.float32(mean), block, dtype)
            self._blocks[key] = block
        return self._blocks[key]


def _repeat(block: np.ndarray, out: np.ndarray) -> None:
    flat = out.reshape(-1)
    whole = flat.size // len(block)
    flat[: whole * len(block)].reshape(whole, len(block))[...] = block
    flat[whole * len(block) :] = block[: flat.size % len(block)]
