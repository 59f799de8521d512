"""Conversions between the floats that files hold and those that stages compute in, in NumPy only.

bfloat16 has no NumPy type: its bits travel as uint16.
"""

from __future__ import annotations

import numpy as np

from transport.messages import DType

NUMPY_DTYPE: dict[DType, np.dtype[np.generic]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 → the bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if nan.any():
        # Rounding would carry a NaN's mantissa into infinity or into the sign.
        rounded[nan] = (bits[nan] >> 16).astype(np.uint16) | 0x40
    return rounded


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Bits of bfloat16 → float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def store_floats(values: np.ndarray, out: np.ndarray, dtype: DType) -> None:
    """Write float32 `values` into `out` of the same shape as `dtype`, to the nearest, ties to even."""
    if dtype == "bfloat16":
        out[...] = bfloat16_bits(values)
    else:
        with np.errstate(over="ignore"):  # Beyond float16's range is infinity there, as in every other library.
            out[...] = values


def check_output(name: str, shape: tuple[int, ...], out: np.ndarray, dtype: DType) -> None:
    """Raise ValueError, a caller's mistake, unless `out` can take the tensor `name` as `dtype`."""
    if out.shape != shape or out.dtype != NUMPY_DTYPE[dtype] or not out.flags.c_contiguous:
        raise ValueError(
            f"{name} {shape} as {dtype} needs a contiguous {NUMPY_DTYPE[dtype]} array, not {out.dtype} {out.shape}"
        )
