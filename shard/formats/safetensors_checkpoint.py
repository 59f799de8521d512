"""A Hugging Face folder: config.json and one or several safetensors files, quantized or not.

What it shows are a model's logical tensors, whatever the files hold for them: weights as floats, MLX's, AWQ's or GPTQ's
packed groups, all experts of a layer in one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shard.formats.affine import AffineRows
from shard.formats.awq_gptq import packed_tensors
from shard.formats.checkpoint import TensorInfo, check_read, check_rows, require_affine
from shard.formats.config import read_config, spec_from
from shard.formats.dtypes import check_output, store_floats
from shard.formats.mlx import mlx_tensors
from shard.formats.quantization import (
    DenseTensor,
    LogicalTensor,
    PackedQuantization,
    quantization_of,
    without_quantization,
)
from shard.formats.safetensors import SafetensorsFiles
from shard.formats.spec import ModelSpec
from shard.formats.weight_folder import HeaderFolder, PlainFolder, WeightFolder
from transport.errors import BadCheckpoint
from transport.messages.ring import DType

_BLOCK_ELEMENTS = 1 << 19


class SafetensorsCheckpoint:
    """All that headers and config.json can tell is checked here, before anything is loaded: files that are cut off,
    scales that do not fit their weights. Raises BadCheckpoint, UnsupportedModel for a quantization that is not known.
    """

    def __init__(
        self, folder: Path, sizes: Mapping[str, int] | None = None, *, weights: WeightFolder | None = None
    ) -> None:
        """`weights` is where the bytes come from, if not from the files in `folder`. `sizes`: those of the whole files,
        by name, where only their headers lie there."""
        if weights is None:
            weights = PlainFolder(folder) if sizes is None else HeaderFolder(folder, sizes)
        config = read_config(folder)
        quantization = quantization_of(config)
        self._config = without_quantization(config)
        self._files = SafetensorsFiles(weights)
        try:
            self._logical: dict[str, LogicalTensor] = (
                packed_tensors(self._files, quantization, config)
                if isinstance(quantization, PackedQuantization)
                else mlx_tensors(self._files, quantization)
            )
        except BaseException:
            self._files.close()
            raise
        self._infos = {name: tensor.info for name, tensor in self._logical.items()}

    @property
    def config(self) -> dict[str, Any]:
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @cached_property
    def spec(self) -> ModelSpec:
        return spec_from(self._config, self._infos, file_bytes=self._files.file_bytes)

    def read_into(self, name: str, out: np.ndarray, dtype: DType) -> None:
        tensor = self._tensor(name)
        check_output(name, tensor.info.shape, out, dtype)
        self._read(tensor, 0, out, dtype)

    def read_rows(self, name: str, first: int, out: np.ndarray, dtype: DType) -> None:
        tensor = self._tensor(name)
        check_read(tensor.info, first, out, dtype)
        self._read(tensor, first, out, dtype)

    def read_affine(self, name: str, first: int, num_rows: int) -> AffineRows:
        tensor = self._tensor(name)
        require_affine(tensor.info)
        check_rows(name, tensor.info.shape, first, num_rows)
        assert not isinstance(tensor, DenseTensor)
        rows = tensor.read(self._files, first, num_rows)
        if not rows.fits_float16():
            raise BadCheckpoint(
                f"{name} in {self._files.folder} has scales that are infinite, not a number or too large",
                hint="pull the model again; if that does not help, take another quantization of it",
            )
        return rows

    def close(self) -> None:
        self._files.close()
        self._logical = {}  # What was read last goes with them.

    def _tensor(self, name: str) -> LogicalTensor:
        tensor = self._logical.get(name)
        if tensor is None:
            raise BadCheckpoint(
                f"{self._files.folder} holds no tensor {name!r}", hint="a file is missing; pull the model again"
            )
        return tensor

    def _read(self, tensor: LogicalTensor, first: int, out: np.ndarray, dtype: DType) -> None:
        """Rows from `first` on, as floats: a quantized tensor's block by block."""
        if isinstance(tensor, DenseTensor):
            columns = tensor.info.shape[-1] if tensor.info.shape else 1
            self._files.read_floats(tensor.stored, tensor.first_element + first * columns, out, dtype)
            return
        step = max(1, _BLOCK_ELEMENTS // tensor.info.shape[-1])
        for done in range(0, len(out), step):
            block = out[done : done + step]
            rows = self.read_affine(tensor.info.name, first + done, len(block))
            store_floats(rows.dequantized(), block, dtype)
