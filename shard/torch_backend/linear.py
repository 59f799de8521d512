"""Projections of a stage on torch: one matrix, or several with one input, behind one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from shard.checkpoint import Checkpoint
from shard.torch_backend.dtypes import TORCH_DTYPES, to_numpy, to_torch
from transport.messages import DType


class Linear(Protocol):
    """y = x · Wᵀ. Rows [0, num_decode) of x belong to decode entries, the others to prefill: each kind has a kernel of
    its own, so that a row's result does not depend on who else is in the batch."""

    num_bytes: int

    def __call__(self, x: torch.Tensor, num_decode: int) -> torch.Tensor:
        """x [rows, columns] → [rows, out], in x's dtype."""


class DenseLinear:
    """W [out, columns] in the compute dtype."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.num_bytes = weight.nbytes

    def __call__(self, x: torch.Tensor, num_decode: int) -> torch.Tensor:
        return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)


def load_linear(checkpoint: Checkpoint, names: Sequence[str], dtype: DType, device: torch.device) -> Linear:
    """The tensors `names` [rows_i, columns], their rows one after another, on `device`. Raises BadCheckpoint."""
    shapes = [checkpoint.tensors[name].shape for name in names]
    weight = torch.empty((sum(shape[0] for shape in shapes), shapes[0][1]), dtype=TORCH_DTYPES[dtype], device=device)
    row = 0
    for name, shape in zip(names, shapes, strict=True):
        out = weight[row : row + shape[0]]
        if device.type == "cpu":
            checkpoint.read_into(name, to_numpy(out), dtype)
        else:
            host = np.empty(shape, to_numpy(torch.empty(0, dtype=TORCH_DTYPES[dtype])).dtype)
            checkpoint.read_into(name, host, dtype)
            out.copy_(to_torch(host, dtype))
        row += shape[0]
    return DenseLinear(weight)
