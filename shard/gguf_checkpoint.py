"""A GGUF that was ingested: opened from its index, its weights dequantized as they are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shard.checkpoint import TensorInfo
from shard.file_blocks import read_exactly
from shard.float_formats import check_output, store_floats
from shard.gguf_dequantize import dequantize_rows, row_bytes
from shard.gguf_index import IndexedTensor, read_index
from shard.model_facts import read_config, spec_from
from shard.spec import ModelSpec
from transport.errors import BadCheckpoint
from transport.messages import DType

_BLOCK_ELEMENTS = 1 << 19


class GgufCheckpoint:
    """The folder that `ingest_gguf` made. Raises BadCheckpoint if the file it points to is gone or has changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = read_index(folder)
        self._path = folder / index.file
        self._tensors = {tensor.name: tensor for tensor in index.tensors}
        self._infos = {
            tensor.name: TensorInfo(
                name=tensor.name, shape=tensor.shape, format=tensor.format, file_bytes=tensor.file_bytes
            )
            for tensor in index.tensors
        }
        self._config = read_config(folder)
        try:
            self._fd = os.open(self._path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise BadCheckpoint(
                f"can't open the model's file {self._path}: {error.strerror}",
                hint="put it back or pull the model again",
            ) from error
        self._size = os.fstat(self._fd).st_size
        if self._size != index.size_bytes:
            self.close()
            raise BadCheckpoint(
                f"{self._path} has {self._size:,} bytes; it had {index.size_bytes:,} when it was pulled",
                hint="pull the model again",
            )

    @property
    def config(self) -> dict[str, Any]:
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @cached_property
    def spec(self) -> ModelSpec:
        return spec_from(self._config, self._infos, file_bytes=self._size)

    def read_into(self, name: str, out: np.ndarray, dtype: DType) -> None:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise BadCheckpoint(f"{self._path} has no tensor {name!r}", hint="the file may be of another model")
        check_output(name, tensor.shape, out, dtype)
        columns = tensor.shape[-1]
        rows = out.reshape(-1, columns)
        bytes_per_row = row_bytes(tensor.format, columns)
        step = _rows_per_block(tensor, len(rows))
        # One buffer for the whole tensor: a block is read, converted and forgotten.
        buffer = np.empty((step, bytes_per_row), np.uint8)
        for first in range(0, len(rows), step):
            data = buffer[: min(step, len(rows) - first)]
            read_exactly(self._fd, data, tensor.offset + first * bytes_per_row, f"{name} in {self._path}")
            values = _as_hugging_face(tensor, dequantize_rows(data, tensor.format))
            store_floats(values, rows[first : first + len(data)], dtype)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _rows_per_block(tensor: IndexedTensor, num_rows: int) -> int:
    step = max(1, _BLOCK_ELEMENTS // tensor.shape[-1])
    if tensor.rotary_heads is not None and len(tensor.shape) == 2:
        # A head's rows are permuted among themselves, so that a block holds whole heads.
        head_rows = num_rows // tensor.rotary_heads
        step = max(head_rows, step // head_rows * head_rows)
    return min(step, num_rows)


def _as_hugging_face(tensor: IndexedTensor, values: np.ndarray) -> np.ndarray:
    """Undo what llama.cpp's converter did to these rows: a bias is one row of all its heads."""
    if tensor.plus_one:
        values = values - np.float32(1)
    if tensor.rotary_heads is None:
        return values
    if len(tensor.shape) == 1:
        return _pairs_apart(values.reshape(-1, 1), tensor.shape[0] // tensor.rotary_heads).reshape(values.shape)
    return _pairs_apart(values, tensor.shape[0] // tensor.rotary_heads)


def _pairs_apart(rows: np.ndarray, head_rows: int) -> np.ndarray:
    """[heads · head_rows, columns]: rows (0, h/2, 1, h/2 + 1, …) of each head back to (0, 1, 2, …)."""
    pairs = rows.reshape(-1, head_rows // 2, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
