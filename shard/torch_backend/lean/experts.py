"""A mixture of experts: a router's choice for each token, and the chosen experts' gated MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shard.torch_backend.lean.layer import GatedMlp


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
        probabilities = _each_alone(x.float(), self.router).softmax(-1)
        weights, chosen = torch.topk(probabilities, self.top_k, dim=-1)
        if self.normalize:
            weights /= weights.sum(-1, keepdim=True)
        output = torch.zeros_like(x)
        for expert, places in sorted(_places(chosen.tolist()).items()):
            # Rows in ascending order, so that those of decode entries come first here, too.
            rows, ranks = torch.tensor(places, device=x.device).unbind(1)
            num_decode_rows = sum(row < num_decode for row, _ in places)
            added = self.experts[expert](x[rows], num_decode_rows)
            output.index_add_(0, rows, added.mul_(weights[rows, ranks, None].to(added.dtype)))
        return output


def _each_alone(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [rows, columns] · weightᵀ, each row as a product of its own: one product of all rows rounds by their number.

    With it, 1e-7 in the router was 6e-5 in the logits of quantized experts, for whoever shared a batch.
    """
    return torch.bmm(x[:, None], weight.t().expand(x.shape[0], -1, -1))[:, 0]


def _places(chosen: list[list[int]]) -> dict[int, list[tuple[int, int]]]:
    """Of each chosen expert, the rows that chose it and where in `chosen` [tokens, top_k] they did."""
    found: dict[int, list[tuple[int, int]]] = {}
    for row, experts in enumerate(chosen):
        for rank, expert in enumerate(experts):
            found.setdefault(expert, []).append((row, rank))
    return found
