"""NumPy on the wire and in files, MLX in between: bfloat16 crosses as its bits in uint16."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from transport.messages import DType

MLX_DTYPE: dict[DType, mx.Dtype] = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
NUMPY_DTYPE: dict[DType, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def to_mlx(array: np.ndarray, dtype: DType) -> mx.array:
    """A copy in MLX's memory; `array` holds `dtype` (uint16 for bfloat16)."""
    copied = mx.array(array)
    return copied.view(mx.bfloat16) if dtype == "bfloat16" else copied


def to_wire(array: mx.array, dtype: DType) -> mx.array:
    """`array` rounded to `dtype`, in a form that NumPy can take."""
    rounded = array.astype(MLX_DTYPE[dtype])
    return rounded.view(mx.uint16) if dtype == "bfloat16" else rounded
