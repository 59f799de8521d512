"""Quantized projections of chunks on MLX's CPU build, whose own kernel does a chunk row by row.

Measured on an x86 core with the build that pip installs (mlx 0.32, netlib's BLAS), 4 bits in groups of 32: the kernel
does 1.1 G multiplications a second whatever the rows; tiles made dense and multiplied by them 1.5 to 2.3 for 16 rows,
2.3 to 2.8 for 64. mx.compile brought nothing there: 127 and 128 ms for a token of SmolLM2.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map

CHUNK_TOKENS = 16
"""From here on making tiles dense is faster for every shape that was measured."""

_TILE_WEIGHTS = 1 << 18


# mypy does not see through mlx.nn: hence the ignored errors.
class CpuLinear(nn.Module):  # type: ignore[name-defined, misc]
    """A QuantizedLinear for x [1, tokens, columns], where a chunk's own length chooses the kernel.

    Decodes, one token in each row of a batch, always take MLX's: who else is in the step changes nothing.
    """

    def __init__(self, quantized: Any) -> None:
        super().__init__()
        self.quantized = quantized

    def __call__(self, x: mx.array) -> mx.array:
        if x.ndim != 3 or x.shape[1] < CHUNK_TOKENS:
            product: mx.array = self.quantized(x)
            return product
        return mx.stack([self._chunk(rows) for rows in x])

    def _chunk(self, x: mx.array) -> mx.array:
        """[tokens, columns] → [tokens, rows of the weights]."""
        module = self.quantized
        # As columns: BLAS runs along the tokens, 2.4 times as fast as dot products of rows.
        columns = mx.contiguous(x.T)
        step = max(1, _TILE_WEIGHTS // x.shape[1])
        tiles = []
        for first in range(0, module.weight.shape[0], step):
            weight, scales, biases = (
                part[first : first + step] for part in (module.weight, module.scales, module.biases)
            )
            tiles.append(mx.dequantize(weight, scales, biases, module.group_size, module.bits) @ columns)
        product = mx.contiguous(mx.concatenate(tiles).T)
        return product + module.bias if "bias" in module else product


def for_cpu(layer: Any) -> None:
    """Give the layer's quantized projections their way with chunks."""

    def replaced(module: Any) -> Any:
        return CpuLinear(module) if isinstance(module, nn.QuantizedLinear) else module  # type: ignore[attr-defined]

    is_leaf = nn.Module.is_module  # type: ignore[attr-defined]
    layer.update_modules(tree_map(replaced, layer.leaf_modules(), is_leaf=is_leaf))
