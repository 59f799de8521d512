"""Between torch tensors and the arrays of the wire, where bfloat16 travels as uint16 bits."""

from __future__ import annotations

import numpy as np
import torch

from transport.messages import DType

TORCH_DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
NUMPY_DTYPES: dict[DType, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
}


def to_torch(array: np.ndarray, dtype: DType) -> torch.Tensor:
    """A tensor of `dtype` over the array's memory, or over a copy of a read-only one: torch has no such tensors."""
    writable = array if array.flags.writeable else array.copy()
    tensor = torch.from_numpy(writable)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The array over a CPU tensor's memory; bfloat16 as uint16 bits."""
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    array: np.ndarray = bits.numpy()
    return array
