"""What a loader needs from a model's files, whatever their format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from shard.affine import AffineForm, AffineRows
from shard.spec import ModelSpec
from transport.messages import DType


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
