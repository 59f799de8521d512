"""Floats → affine groups, with no more error than the usual min/max quantization leaves.

Each group starts from the range of its numbers, as `mx.quantize` does. With the q of that, scale and bias are those of
least squares; with these, q is the nearest again. Every such round lowers the squared error or leaves it.
"""

from __future__ import annotations

import numpy as np

from shard.affine import AffineRows

# Beyond 4 bits the first rounding is so fine that fitting changes the error by less than a hundredth.
_ROUNDS = {2: 4, 3: 3, 4: 2}
_CACHED_WEIGHTS = 1 << 16
"""Quantized at once: what passes over them several times stays in the cache."""


def quantize_rows(values: np.ndarray, bits: int, group: int) -> AffineRows:
    """float32 [rows, columns], columns % group == 0, → the nearest q of `bits` bits with a scale and a bias a group.

    A group that is constant, zeros above all, comes back exactly. Where numbers are not finite, neither are the scale
    and bias of their group.
    """
    num_rows, columns = values.shape
    groups = values.reshape(-1, group)
    q = np.empty(groups.shape, np.uint8)
    scales, biases = np.empty((len(groups), 1), np.float32), np.empty((len(groups), 1), np.float32)
    step = _CACHED_WEIGHTS // group
    for first in range(0, len(groups), step):
        span = slice(first, first + step)
        q[span], scales[span], biases[span] = _quantized(groups[span], bits)
    return AffineRows(
        q=q.reshape(num_rows, columns), scales=scales.reshape(num_rows, -1), biases=biases.reshape(num_rows, -1)
    )


def _quantized(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 [groups, group] → q uint8 of that shape, scales and biases [groups, 1]."""
    with np.errstate(over="ignore", invalid="ignore"):
        # Down contiguous columns, which is three times as fast as along rows.
        across = np.ascontiguousarray(w.T)
        low, high = np.minimum.reduce(across)[:, None], np.maximum.reduce(across)[:, None]
        # From here on as differences from the lowest number of the group: nothing cancels in sums of them.
        w = w - low
        scale = (high - low) / np.float32(2**bits - 1)
        scale[scale == 0] = 1  # A constant group: q is 0, the bias its number.
        bias = np.zeros_like(scale)
        q = _nearest(w, scale, bias, bits)
        for _ in range(_ROUNDS.get(bits, 0)):
            scale, bias = _least_squares(w, q, scale, bias)
            q = _nearest(w, scale, bias, bits)
        return q.astype(np.uint8), scale, bias + low


def _nearest(w: np.ndarray, scale: np.ndarray, bias: np.ndarray, bits: int) -> np.ndarray:
    """The q of each number, still as float32 [groups, group]."""
    q: np.ndarray = w - bias
    q /= scale
    np.rint(q, out=q)
    np.maximum(q, 0, out=q)
    np.minimum(q, 2**bits - 1, out=q)
    return q


def _least_squares(w: np.ndarray, q: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scale and bias that bring scale · q + bias nearest to w; the old ones where all q of a group are the same."""
    group = np.float32(w.shape[1])
    q_sum = np.einsum("ij->i", q)[:, None]
    w_sum = np.einsum("ij->i", w)[:, None]
    spread = group * np.einsum("ij,ij->i", q, q)[:, None] - q_sum * q_sum  # Of small whole numbers: exact.
    fitted = (group * np.einsum("ij,ij->i", q, w)[:, None] - q_sum * w_sum) / np.maximum(spread, 1)
    useful = (spread > 0) & (fitted > 0)
    return np.where(useful, fitted, scale), np.where(useful, (w_sum - fitted * q_sum) / group, bias)
