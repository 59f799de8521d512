"""An ingested GGUF is opened as a checkpoint from its index."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from shard.formats.affine import AffineRows
from shard.formats.checkpoint import TensorInfo, check_read, check_rows, matrix_rows, require_affine
from shard.formats.config import read_config, spec_from
from shard.formats.dtypes import check_output, store_floats
from shard.formats.gguf.index import GgufIndex, IndexedTensor, read_index
from shard.formats.gguf.quants import affine_form, affine_rows, check_format, dequantize_rows, row_bytes
from shard.formats.spec import ModelSpec
from shard.formats.weight_folder import PlainFolder, WeightFolder
from transport.errors import BadCheckpoint
from transport.messages.ring import DType

_BLOCK_ELEMENTS = 1 << 19
_MAX_DIMENSIONS = 4


class GgufCheckpoint:
    """The folder that `ingest_gguf` made. Raises BadCheckpoint if the file it points to is gone or has changed."""

    def __init__(self, folder: Path, *, weights: WeightFolder | None = None) -> None:
        """`weights` is where the file's bytes come from, if not from the file itself."""
        index = read_index(folder)
        _check(folder, index)
        self._file = index.file
        self._path = folder / index.file
        self._tensors = {tensor.name: tensor for tensor in index.tensors}
        self._infos = {
            tensor.name: TensorInfo(
                name=tensor.name,
                shape=tensor.shape,
                format=tensor.format,
                file_bytes=tensor.file_bytes,
                affine=affine_form(tensor.format, tensor.shape),
            )
            for tensor in index.tensors
        }
        self._config = read_config(folder)
        self._weights = PlainFolder(folder) if weights is None else weights
        self._size = self._weights.size_bytes(index.file)
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
        tensor = self._tensor(name)
        check_output(name, tensor.shape, out, dtype)
        self.read_rows(name, 0, out.reshape(-1, tensor.shape[-1]), dtype)

    def read_rows(self, name: str, first: int, out: np.ndarray, dtype: DType) -> None:
        tensor = self._tensor(name)
        check_read(self._infos[name], first, out, dtype)
        for at, data in self._blocks(tensor, first, len(out)):
            values = _undo_conversion(tensor, dequantize_rows(data, tensor.format))
            store_floats(values, out[at : at + len(data)], dtype)

    def read_affine(self, name: str, first: int, num_rows: int) -> AffineRows:
        tensor = self._tensor(name)
        form = require_affine(self._infos[name])
        check_rows(name, tensor.shape, first, num_rows)
        made = AffineRows.empty(num_rows, tensor.shape[-1], form.group)
        for at, data in self._blocks(tensor, first, num_rows):
            made.fill(at, affine_rows(data, tensor.format))
        if not made.fits_float16():
            raise BadCheckpoint(
                f"{name} in {self._path} has scales that are infinite, not a number or too large",
                hint="download it again",
            )
        return made

    def _tensor(self, name: str) -> IndexedTensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise BadCheckpoint(f"{self._path} has no tensor {name!r}", hint="the file may be of another model")
        return tensor

    def _blocks(self, tensor: IndexedTensor, first: int, num_rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """Rows [first, first + num_rows) as blocks of bytes, uint8 [rows, row bytes], in Hugging Face's order of rows.

        With each comes the number of rows before it. A block is gone when the next one is asked for.
        """
        columns = tensor.shape[-1]
        bytes_per_row = row_bytes(tensor.format, columns)
        # A head's rows are permuted among themselves: whole heads are read.
        unit = 1
        if tensor.rotary_heads is not None and len(tensor.shape) > 1:
            unit = matrix_rows(tensor.shape) // tensor.rotary_heads
        last = first + num_rows
        at, end = first // unit * unit, -(-last // unit) * unit
        step = min(max(1, _BLOCK_ELEMENTS // (columns * unit)) * unit, end - at)
        buffer = np.empty((step, bytes_per_row), np.uint8)
        for block in range(at, end, step) if num_rows else ():
            data = buffer[: end - block]
            offset = tensor.offset + block * bytes_per_row
            self._weights.read(self._file, data, offset, f"{tensor.name} in {self._path}")
            rows = data if unit == 1 else _deinterleave_pairs(data, unit)
            start = max(block, first)
            yield start - first, rows[start - block : last - block]

    def close(self) -> None:
        self._weights.close()


def _check(folder: Path, index: GgufIndex) -> None:
    """Raise BadCheckpoint unless all tensors can lie where the index says. It may come from another host."""
    for format in sorted({tensor.format for tensor in index.tensors}):
        if format not in GGMLQuantizationType.__members__:
            raise _index_error(folder, f"no tensor is of type {format!r}")
        check_format(format)
    for tensor in index.tensors:
        shape, heads = tensor.shape, tensor.rotary_heads
        if not 1 <= len(shape) <= _MAX_DIMENSIONS or min(shape) < 1:
            raise _index_error(folder, f"{tensor.name!r} has the shape {shape}")
        expected = math.prod(shape[:-1]) * row_bytes(tensor.format, shape[-1])
        if tensor.file_bytes != expected or not 0 <= tensor.offset <= index.size_bytes - expected:
            raise _index_error(
                folder,
                f"{tensor.name!r} of shape {shape} can't be {tensor.file_bytes:,} bytes at byte "
                f"{tensor.offset:,} of {index.size_bytes:,}",
            )
        if heads is not None and (heads < 1 or shape[0] % (2 * heads)):
            raise _index_error(folder, f"{tensor.name!r} has {shape[0]} rows, which {heads} heads can't share")


def _index_error(folder: Path, why: str) -> BadCheckpoint:
    return BadCheckpoint(f"the index of {folder} is wrong: {why}", hint="pull the model again")


def _undo_conversion(tensor: IndexedTensor, values: np.ndarray) -> np.ndarray:
    """What llama.cpp's converter did to these numbers, besides the order of a matrix's rows.

    A bias is one row of all its heads.
    """
    if tensor.plus_one:
        values = values - np.float32(1)
    if tensor.rotary_heads is None or len(tensor.shape) > 1:
        return values
    return _deinterleave_pairs(values.reshape(-1, 1), tensor.shape[0] // tensor.rotary_heads).reshape(values.shape)


def _deinterleave_pairs(rows: np.ndarray, head_rows: int) -> np.ndarray:
    """[heads · head_rows, columns]: rows (0, h/2, 1, h/2 + 1, …) of each head back to (0, 1, 2, …)."""
    pairs = rows.reshape(-1, head_rows // 2, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
