"""Parameters filled from a checkpoint in MLX's own memory: NumPy writes where MLX will read, nothing is copied."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import mlx.core as mx
import numpy as np

from shard.affine import AffineForm
from shard.checkpoint import Checkpoint
from shard.float_formats import store_floats
from shard.mlx_backend.packing import pack, packed_words
from transport.messages import DType

Index = tuple[()] | tuple[int]

_PIECE_WEIGHTS = 1 << 19
_MAX_READERS = 4
_STORED: Mapping[DType, mx.Dtype] = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.uint16}


class Parameter(Protocol):
    """What a module's weights are while they are read."""

    def read(self, checkpoint: Checkpoint, name: str, index: Index, note: Callable[[int], None]) -> None:
        """Fill `parameter[index]` from the tensor `name`; `note` is called with bytes of the file read since."""

    def arrays(self) -> dict[str, mx.array]:
        """The module's parameters by name, evaluated. Ends the filling."""


class DenseParameter:
    """An array of `dtype`; `name` is the module's for it."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: DType) -> None:
        self._name = name
        self._dtype = dtype
        self._array = _Filled(shape, _STORED[dtype])

    def read(self, checkpoint: Checkpoint, name: str, index: Index, note: Callable[[int], None]) -> None:
        checkpoint.read_into(name, self._array.view[index], self._dtype)
        note(checkpoint.tensors[name].file_bytes)

    def arrays(self) -> dict[str, mx.array]:
        return {self._name: self._array.floats(self._dtype)}


class AffineParameter:
    """Packed weights with scales and biases of `dtype`, read and packed in pieces by a few threads.

    `shape` is that of the numbers they stand for, [rows, columns] or [experts, rows, columns].
    """

    def __init__(self, shape: tuple[int, ...], form: AffineForm, dtype: DType) -> None:
        self._form = form
        self._dtype = dtype
        self._columns = shape[-1]
        groups = (*shape[:-1], shape[-1] // form.group)
        self._words = _Filled((*shape[:-1], packed_words(shape[-1], form.bits)), mx.uint32)
        self._scales = _Filled(groups, _STORED[dtype])
        self._biases = _Filled(groups, _STORED[dtype])

    def read(self, checkpoint: Checkpoint, name: str, index: Index, note: Callable[[int], None]) -> None:
        words, scales, biases = (part.view[index] for part in (self._words, self._scales, self._biases))
        file_bytes, num_rows = checkpoint.tensors[name].file_bytes, len(words)

        def piece(first: int) -> int:
            end = min(first + step, num_rows)
            rows = checkpoint.read_affine(name, first, end - first)
            pack(rows.q, self._form.bits, words[first:end])
            store_floats(rows.scales, scales[first:end], self._dtype)
            store_floats(rows.biases, biases[first:end], self._dtype)
            return file_bytes * end // num_rows - file_bytes * first // num_rows

        step = max(1, _PIECE_WEIGHTS // self._columns)
        pieces = range(0, num_rows, step)
        if len(pieces) == 1:
            note(piece(0))
            return
        with ThreadPoolExecutor(min(_MAX_READERS, os.cpu_count() or 1)) as pool:
            for num_bytes in pool.map(piece, pieces):
                note(num_bytes)

    def arrays(self) -> dict[str, mx.array]:
        return {
            "weight": self._words.array,
            "scales": self._scales.floats(self._dtype),
            "biases": self._biases.floats(self._dtype),
        }


class _Filled:
    """An array of MLX's and a NumPy `view` of its memory, through which it is filled before MLX computes with it."""

    def __init__(self, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
        self.array = mx.zeros(shape, dtype)
        mx.eval(self.array)
        self.view = np.array(self.array, copy=False)

    def floats(self, dtype: DType) -> mx.array:
        """The same memory, bits in uint16 taken as the bfloat16 that they are."""
        if dtype != "bfloat16":
            return self.array
        floats = self.array.view(mx.bfloat16)
        mx.eval(floats)
        return floats
