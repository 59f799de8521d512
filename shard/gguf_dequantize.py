"""Rows of a GGUF tensor's bytes → float32, bit for bit what the `gguf` package's own dequantization gives.

The types that are read most are several times faster here; the rest is left to `gguf.quants`.
Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from shard.float_formats import from_bfloat16
from transport.errors import UnsupportedModel


def row_bytes(format: str, columns: int) -> int:
    """Bytes of a row of `columns` elements."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[format]]
    return columns // int(block) * int(block_bytes)


def check_format(format: str) -> None:
    """Raise UnsupportedModel for a type that can't be turned into floats."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[format]]
    try:
        values = dequantize_rows(np.zeros((1, int(block_bytes)), np.uint8), format)
    except NotImplementedError:
        values = None
    if values is None or values.shape != (1, block) or values.dtype != np.float32:
        raise UnsupportedModel(
            f"tensors of GGUF type {format} can't be read", hint="take a Q4_K_M, Q5_K_M, Q8_0, F16 or BF16 file"
        )


def dequantize_rows(data: np.ndarray, format: str) -> np.ndarray:
    """uint8 [rows, row bytes] → float32 [rows, columns]."""
    # Corrupt scales overflow; they are checked for nowhere, as in llama.cpp, so they must not warn here either.
    with np.errstate(over="ignore", invalid="ignore"):
        fast = _FORMATS.get(format)
        if fast is not None:
            return fast(data).reshape(len(data), -1)
        values: np.ndarray = quants.dequantize(data, GGMLQuantizationType[format])
        return values


def _f32(data: np.ndarray) -> np.ndarray:
    return data.view(np.float32)


def _f16(data: np.ndarray) -> np.ndarray:
    return data.view(np.float16).astype(np.float32)


def _bf16(data: np.ndarray) -> np.ndarray:
    return from_bfloat16(data.view(np.uint16))


def _halves(blocks: np.ndarray, first: int, last: int) -> np.ndarray:
    """Columns [first, last) as float16 numbers → float32."""
    return np.ascontiguousarray(blocks[:, first:last]).view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [blocks, 16] → float32 [blocks, 32]: low nibbles, then high ones."""
    values = np.empty((len(packed), 32), np.float32)
    np.bitwise_and(packed, 15, out=values[:, :16], casting="unsafe")
    np.right_shift(packed, 4, out=values[:, 16:], casting="unsafe")
    return values


def _q4_0(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, 18)
    values = _nibbles(blocks[:, 2:])
    values -= 8
    values *= _halves(blocks, 0, 2)
    return values


def _q4_1(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, 20)
    values = _nibbles(blocks[:, 4:])
    values *= _halves(blocks, 0, 2)
    values += _halves(blocks, 2, 4)
    return values


def _q8_0(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, 34)
    values = blocks[:, 2:].view(np.int8).astype(np.float32)
    values *= _halves(blocks, 0, 2)
    return values


def _q6_k(data: np.ndarray) -> np.ndarray:
    """Superblocks of 16 groups of 16: 128 bytes of low halves, 64 of two high bits each, 16 signed scales, then d."""
    blocks = data.reshape(-1, 210)
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 32)
    q = np.empty((len(blocks), 2, 4, 32), np.uint8)
    np.bitwise_and(low, 15, out=q[:, :, :2])
    np.right_shift(low, 4, out=q[:, :, 2:])
    for quarter in range(4):
        q[:, :, quarter] |= ((high >> (2 * quarter)) & 3) << 4
    values = q.reshape(-1, 16, 16).astype(np.float32)
    values -= 32
    scales = blocks[:, 192:208].view(np.int8) * _halves(blocks, 208, 210)
    values *= scales[..., None]
    return values


_FORMATS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _f32, "F16": _f16, "BF16": _bf16, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0, "Q6_K": _q6_k,
}  # fmt: skip
