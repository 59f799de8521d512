"""Small unsigned numbers out of the words that they are packed in, least significant bits first."""

from __future__ import annotations

import numpy as np


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
