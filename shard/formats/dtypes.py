"""Dtypes convert the floats and the packed integers of files to those that stages compute with, in NumPy."""

from __future__ import annotations

import numpy as np

from shard.stage import StageSpec
from transport.messages.ring import DType

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


def empty_output(spec: StageSpec, hidden_size: int, vocab_size: int) -> np.ndarray:
    """What a backend makes of an empty batch."""
    if spec.is_last:
        return np.empty((0, vocab_size), np.float32)
    return np.empty((0, hidden_size), NUMPY_DTYPE[spec.next_dtype])


def unpack_stream(data: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [rows, bytes], each row a stream of numbers of `bits` bits, → uint8 [rows, bytes · 8 / bits].

    So MLX packs a row into little-endian uint32 words; with 3, 5 and 6 bits numbers go over the borders of bytes.
    """
    rows, num_bytes = data.shape
    if bits == 8:
        return data
    if bits in (2, 4):
        per = 8 // bits
        q = np.empty((rows, num_bytes, per), np.uint8)
        for i in range(per):
            np.right_shift(data, bits * i, out=q[..., i])
        q &= 2**bits - 1
        return q.reshape(rows, num_bytes * per)
    # Eight numbers take `bits` bytes.
    eights = np.zeros((rows, num_bytes // bits, 8), np.uint8)
    eights[..., :bits] = data.reshape(rows, num_bytes // bits, bits)
    words = eights.view("<u8")[..., 0]
    q = np.empty((*words.shape, 8), np.uint8)
    for i in range(8):
        q[..., i] = (words >> np.uint64(bits * i)) & np.uint64(2**bits - 1)
    return q.reshape(rows, num_bytes // bits * 8)


def unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """uint32 [...] → uint8 [..., 32 / bits]: the numbers of each word."""
    per = 32 // bits
    q = np.empty((*words.shape, per), np.uint8)
    mask = np.uint32(2**bits - 1)
    for i in range(per):
        q[..., i] = (words >> np.uint32(bits * i)) & mask
    return q
