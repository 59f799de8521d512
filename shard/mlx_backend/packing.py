"""Quantized weights as MLX holds them: the bits of a row one after another, in uint32 words.

The layout is that of mx.quantize (https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html):
weight i of a row takes bits [i · bits, (i + 1) · bits) of the row's bytes, counted from each byte's lowest.
"""

from __future__ import annotations

import numpy as np


def packed_words(columns: int, bits: int) -> int:
    """uint32 words that a row takes; `columns` is a multiple of 32."""
    return columns * bits // 32


def pack(q: np.ndarray, bits: int, out: np.ndarray) -> None:
    """q uint8 [rows, columns], C-contiguous, all < 2^bits → `out` uint32 [rows, packed_words], C-contiguous."""
    packed = _halved(q, bits) if bits in (2, 4, 8) else _squeezed(q, bits)
    out.reshape(-1).view(np.uint8)[...] = packed


def _halved(q: np.ndarray, bits: int) -> np.ndarray:
    """Bits that divide a byte: neighbours share one, until bytes are full."""
    packed = q.reshape(-1)
    while bits < 8:
        pairs = packed.view("<u2")
        packed = (pairs | (pairs >> (8 - bits))).astype(np.uint8)
        bits *= 2
    return packed


def _squeezed(q: np.ndarray, bits: int) -> np.ndarray:
    """Any other bits: eight weights are a 64-bit word, of which `bits` bytes are left when the gaps are out."""
    words = q.reshape(-1).view("<u8")
    for width in (8, 16, 32):
        filled = bits * width // 8
        low = sum(((1 << filled) - 1) << shift for shift in range(0, 64, 2 * width))
        words = (words & np.uint64(low)) | ((words >> np.uint64(width - filled)) & np.uint64(low << filled))
    packed: np.ndarray = words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)
    return packed
