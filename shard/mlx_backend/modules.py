"""The modules of a stage: embedding, layers, lm_head; arrays of the wire; and chunks' projections on MLX's CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_map

from transport.messages.ring import DType

MLX_DTYPE: dict[DType, mx.Dtype] = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def to_mlx(array: np.ndarray, dtype: DType) -> mx.array:
    """A copy in MLX's memory; `array` holds `dtype` (uint16 for bfloat16)."""
    copied = mx.array(array)
    return copied.view(mx.bfloat16) if dtype == "bfloat16" else copied


def to_wire(array: mx.array, dtype: DType) -> mx.array:
    """`array` rounded to `dtype`, in a form that NumPy can take."""
    rounded = array.astype(MLX_DTYPE[dtype])
    return rounded.view(mx.uint16) if dtype == "bfloat16" else rounded


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


def use_cpu_kernels(layer: Any) -> None:
    """Give the layer's quantized projections their way with chunks."""

    def replaced(module: Any) -> Any:
        return CpuLinear(module) if isinstance(module, nn.QuantizedLinear) else module  # type: ignore[attr-defined]

    is_leaf = nn.Module.is_module  # type: ignore[attr-defined]
    layer.update_modules(tree_map(replaced, layer.leaf_modules(), is_leaf=is_leaf))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageModules:
    """Modules of mlx-lm (untyped, so `Any`); `embed` is also the head where embeddings are tied and `head` is None."""

    layers: list[Any]
    windows: tuple[int | None, ...]
    embed: Any | None
    norm: Any | None
    lm_head: Any | None
    hidden_size: int
    vocab_size: int
    embed_scale: float | None
    softcap: float | None
    array_masks: bool
    batched_decode: bool

    def embedding(self, token_ids: mx.array, dtype: DType) -> mx.array:
        """ids [batch, tokens] → [batch, tokens, hidden_size].

        Gemma's scale is rounded to the compute dtype and no further, as transformers does (mlx-lm: always bfloat16).
        """
        assert self.embed is not None
        hidden: mx.array = self.embed(token_ids)
        if self.embed_scale is None:
            return hidden
        return hidden * mx.array(self.embed_scale, MLX_DTYPE[dtype])

    def logits(self, hidden: mx.array) -> mx.array:
        """[rows, hidden_size] → float32 [rows, vocab_size]."""
        assert self.norm is not None
        normed = self.norm(hidden)
        logits: mx.array
        if self.lm_head is not None:
            logits = self.lm_head(normed)
        else:
            assert self.embed is not None
            logits = self.embed.as_linear(normed)
        if self.softcap is not None:
            logits = mx.tanh(logits / self.softcap) * self.softcap
        return logits.astype(mx.float32)
