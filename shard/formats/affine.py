"""The affine form: groups of a row's weights share a scale and a bias; and how floats are quantized into it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
_FLOAT16_MAX = 65504.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AffineForm:
    """`exact`: the numbers are the file's own; otherwise they were quantized anew when they were read."""

    bits: int
    group: int
    exact: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class AffineRows:
    """Rows of one tensor: q uint8 [rows, columns], scales and biases float32 [rows, columns / group], C-contiguous."""

    q: np.ndarray
    scales: np.ndarray
    biases: np.ndarray

    @classmethod
    def empty(cls, num_rows: int, columns: int, group: int) -> AffineRows:
        """Rows yet to be filled."""
        return cls(
            q=np.empty((num_rows, columns), np.uint8),
            scales=np.empty((num_rows, columns // group), np.float32),
            biases=np.empty((num_rows, columns // group), np.float32),
        )

    def fill(self, first: int, rows: AffineRows) -> None:
        """Copy `rows` to the rows from `first` on."""
        last = first + len(rows.q)
        self.q[first:last] = rows.q
        self.scales[first:last] = rows.scales
        self.biases[first:last] = rows.biases

    def fits_float16(self) -> bool:
        """Whether every scale and bias is a number that float16 holds, as kernels do; NaN is none."""
        return all(bool((np.abs(numbers) <= _FLOAT16_MAX).all()) for numbers in (self.scales, self.biases))

    def dequantized(self) -> np.ndarray:
        """float32 [rows, columns]: scale · q + bias, each operation rounded once, as the readers of the formats do."""
        rows, groups = self.scales.shape
        columns = self.q.shape[1]
        values = self.q.reshape(rows, groups, columns // groups).astype(np.float32)
        values *= self.scales[..., None]
        values += self.biases[..., None]
        return values.reshape(rows, columns)


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
        q[span], scales[span], biases[span] = _quantize_groups(groups[span], bits)
    return AffineRows(
        q=q.reshape(num_rows, columns), scales=scales.reshape(num_rows, -1), biases=biases.reshape(num_rows, -1)
    )


def _quantize_groups(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
