"""The quantized form that every backend runs: groups of a row's weights that share a scale and a bias.

w = scale · q + bias, q unsigned with `bits` bits, `group` consecutive weights of a row: MLX's affine layout, and what
GGUF's Q4_0 … Q8_0, Q4_K and Q5_K, AWQ and GPTQ are when they are written out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
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
