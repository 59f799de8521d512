"""A fused decoder layer: norms, attention, a gated MLP or a mixture of experts, and the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from shard.torch_backend.fused.attention import Attention
from shard.torch_backend.fused.ops import GatedActivation, RmsNorm, rms_norm, rms_norm_of_sum
from shard.torch_backend.fused.step import FusedStep
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
    gate: GatedActivation

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

    before_attention: RmsNorm | None
    after_attention: RmsNorm | None
    before_mlp: RmsNorm | None
    after_mlp: RmsNorm | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    norms: LayerNorms
    attention: Attention
    mlp: FeedForward
    residual_multiplier: float

    def __call__(self, x: torch.Tensor, step: FusedStep) -> None:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseMlp:
    """Each token's `top_k` best experts, weighted by the router's softmax, made to sum to 1 where `normalize`.

    router [experts, hidden] float32: a choice of experts hangs on its last bits.
    """

    router: torch.Tensor
    experts: Sequence[GatedMlp]
    top_k: int
    normalize: bool

    def __call__(self, x: torch.Tensor, num_decode: int) -> torch.Tensor:
        """x [tokens, hidden] → [tokens, hidden]. A token's experts are added up in the order of their numbers, whoever
        else is in the batch."""
        probabilities = _router_logits(x.float(), self.router).softmax(-1)
        weights, chosen = torch.topk(probabilities, self.top_k, dim=-1)
        if self.normalize:
            weights /= weights.sum(-1, keepdim=True)
        output = torch.zeros_like(x)
        for expert, places in sorted(_tokens_of_experts(chosen.tolist()).items()):
            # Rows in ascending order, so that those of decode entries come first here, too.
            rows, ranks = torch.tensor(places, device=x.device).unbind(1)
            num_decode_rows = sum(row < num_decode for row, _ in places)
            added = self.experts[expert](x[rows], num_decode_rows)
            output.index_add_(0, rows, added.mul_(weights[rows, ranks, None].to(added.dtype)))
        return output


def _router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [rows, columns] · weightᵀ, each row as a product of its own: one product of all rows rounds by their number.

    With it, 1e-7 in the router was 6e-5 in the logits of quantized experts, for whoever shared a batch.
    """
    return torch.bmm(x[:, None], weight.t().expand(x.shape[0], -1, -1))[:, 0]


def _tokens_of_experts(chosen: list[list[int]]) -> dict[int, list[tuple[int, int]]]:
    """Of each chosen expert, the rows that chose it and where in `chosen` [tokens, top_k] they did."""
    found: dict[int, list[tuple[int, int]]] = {}
    for row, experts in enumerate(chosen):
        for rank, expert in enumerate(experts):
            found.setdefault(expert, []).append((row, rank))
    return found
