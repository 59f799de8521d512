"""A lean decoder layer: norms, attention, gated MLP, and a residual stream that is added to in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from shard.torch_backend.lean.attention import Attention
from shard.torch_backend.lean.ops import Gated, Norm, rms_norm, rms_norm_of_sum
from shard.torch_backend.lean.step import LeanStep
from shard.torch_backend.linear import Linear

_BLOCK_ROWS = 256


class FeedForward(Protocol):
    """What follows attention: a gated MLP, or a mixture of them."""

    def __call__(self, x: torch.Tensor, num_decode: int) -> torch.Tensor:
        """x [tokens, hidden] → [tokens, hidden]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedMlp:
    """down(activation(gate(x)) · up(x)); gate_up: the rows of gate, then those of up."""

    gate_up: Linear
    gate_up_bias: torch.Tensor | None
    down: Linear
    down_bias: torch.Tensor | None
    gate: Gated

    def __call__(self, x: torch.Tensor, num_decode: int) -> torch.Tensor:
        """A long chunk goes in blocks of rows: its intermediate features, several times as wide, need never be held at
        once."""
        if x.shape[0] <= _BLOCK_ROWS:
            return self._block(x, num_decode)
        output = torch.empty_like(x)
        for first in range(0, x.shape[0], _BLOCK_ROWS):
            rows = x[first : first + _BLOCK_ROWS]
            output[first : first + _BLOCK_ROWS] = self._block(rows, min(max(0, num_decode - first), len(rows)))
        return output

    def _block(self, x: torch.Tensor, num_decode: int) -> torch.Tensor:
        gate_up = self.gate_up(x, num_decode)
        if self.gate_up_bias is not None:
            gate_up.add_(self.gate_up_bias)
        output = self.down(self.gate(gate_up), num_decode)
        return output if self.down_bias is None else output.add_(self.down_bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNorms:
    """None where the family has no norm in that place."""

    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    norms: LayerNorms
    attention: Attention
    mlp: FeedForward
    residual_multiplier: float

    def __call__(self, x: torch.Tensor, step: LeanStep) -> None:
        """Add the layer's two blocks to the residual stream x [tokens, hidden], in place."""
        norms = self.norms
        normed = x if norms.before_attention is None else rms_norm(x, norms.before_attention)
        added = self.attention(normed, step)
        if norms.after_attention is not None:
            added = rms_norm(added, norms.after_attention)
        if norms.before_mlp is not None and self.residual_multiplier == 1.0:
            normed = rms_norm_of_sum(x, added, norms.before_mlp)
        else:
            self._add(x, added)
            normed = x if norms.before_mlp is None else rms_norm(x, norms.before_mlp)
        added = self.mlp(normed, step.num_decode)
        self._add(x, added if norms.after_mlp is None else rms_norm(added, norms.after_mlp))

    def _add(self, x: torch.Tensor, added: torch.Tensor) -> None:
        x.add_(added, alpha=self.residual_multiplier)
