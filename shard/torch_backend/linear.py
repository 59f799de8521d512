"""Projections of a stage on torch: one matrix, or several with one input, behind one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from shard.formats.checkpoint import Checkpoint
from shard.formats.dtypes import NUMPY_DTYPE
from shard.torch_backend.tensors import TORCH_DTYPES, to_numpy, to_torch
from transport.messages.ring import DType

if TYPE_CHECKING:
    from shard.torch_backend.cpu.linear import CpuAffineLinear

OnBytesRead = Callable[[int], None]
"""Called with the bytes of the file that were read since."""


class Linear(Protocol):
    """y = x · Wᵀ. Rows [0, num_decode) of x belong to decode entries, the others to prefill: each kind has a kernel of
    its own, so that a row's result does not depend on who else is in the batch."""

    num_bytes: int

    def __call__(self, x: torch.Tensor, num_decode: int) -> torch.Tensor:
        """x [rows, columns] → [rows, out], in x's dtype."""


class EmbeddingTable(Linear, Protocol):
    """A projection whose matrix is read by rows too: an embedding, which may be the head as well."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of W, [len(ids), columns]."""


class DenseLinear:
    """W [out, columns] in the compute dtype."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.num_bytes = weight.nbytes

    def __call__(self, x: torch.Tensor, num_decode: int) -> torch.Tensor:
        if x.dtype == self.weight.dtype:
            return torch.nn.functional.linear(x, self.weight)
        return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, self.weight)


class ConcatenatedLinear:
    """Several projections of one input, which can't be one matrix: outputs side by side."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self._parts = parts
        self.num_bytes = sum(part.num_bytes for part in parts)

    def __call__(self, x: torch.Tensor, num_decode: int) -> torch.Tensor:
        return torch.cat([part(x, num_decode) for part in self._parts], dim=1)


def load_linear(
    checkpoint: Checkpoint,
    names: Sequence[str],
    dtype: DType,
    device: torch.device,
    read: OnBytesRead = lambda num_bytes: None,
) -> Linear:
    """The tensors `names` [rows_i, columns], their rows one after another, on `device`: quantized where they are in the
    file, dense in `dtype` otherwise. Raises BadCheckpoint, UnsupportedModel."""
    runs: list[list[str]] = []
    for name in names:
        if runs and _is_affine(checkpoint, name) == _is_affine(checkpoint, runs[-1][-1]):
            runs[-1].append(name)
        else:
            runs.append([name])
    parts = [
        _load_affine(checkpoint, run, dtype, device, read)
        if _is_affine(checkpoint, run[0])
        else _load_dense(checkpoint, run, dtype, device, read)
        for run in runs
    ]
    return parts[0] if len(parts) == 1 else ConcatenatedLinear(parts)


def load_embedding_table(
    checkpoint: Checkpoint, name: str, dtype: DType, device: torch.device, read: OnBytesRead = lambda num_bytes: None
) -> EmbeddingTable:
    """As `load_linear`, for one matrix that is read by rows too."""
    if not _is_affine(checkpoint, name):
        return _load_dense(checkpoint, [name], dtype, device, read)
    if device.type == "cpu":
        return _load_cpu(checkpoint, [name], dtype, read)
    from shard.torch_backend.gpu.linear import load_device_embedding_table

    return load_device_embedding_table(checkpoint, name, dtype, device, read)


def _is_affine(checkpoint: Checkpoint, name: str) -> bool:
    return checkpoint.tensors[name].affine is not None


# Each kind of device has kernels of its own, and what they need is imported only where they run.


def _load_affine(
    checkpoint: Checkpoint, names: Sequence[str], dtype: DType, device: torch.device, read: OnBytesRead
) -> Linear:
    if device.type == "cpu":
        return _load_cpu(checkpoint, names, dtype, read)
    from shard.torch_backend.gpu.linear import load_device_linear

    parts = [load_device_linear(checkpoint, name, dtype, device, read) for name in names]
    return parts[0] if len(parts) == 1 else ConcatenatedLinear(parts)


def _load_cpu(checkpoint: Checkpoint, names: Sequence[str], dtype: DType, read: OnBytesRead) -> CpuAffineLinear:
    from shard.torch_backend.cpu.linear import load_affine_linear

    # Whoever computes in float32 wants all of its digits.
    return load_affine_linear(checkpoint, names, prefill=16 if dtype == "float32" else 8, read=read)


def _load_dense(
    checkpoint: Checkpoint, names: Sequence[str], dtype: DType, device: torch.device, read: OnBytesRead
) -> DenseLinear:
    shapes = [checkpoint.tensors[name].shape for name in names]
    weight = torch.empty((sum(shape[0] for shape in shapes), shapes[0][1]), dtype=TORCH_DTYPES[dtype], device=device)
    row = 0
    for name, shape in zip(names, shapes, strict=True):
        out = weight[row : row + shape[0]]
        if device.type == "cpu":
            checkpoint.read_into(name, to_numpy(out), dtype)
        else:
            host = np.empty(shape, NUMPY_DTYPE[dtype])
            checkpoint.read_into(name, host, dtype)
            out.copy_(to_torch(host, dtype))
        row += shape[0]
        read(checkpoint.tensors[name].file_bytes)
    return DenseLinear(weight)
