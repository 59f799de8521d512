"""How far next-token distributions are from those that they should be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Expected:
    """The reference over one window: log-probabilities float64 [tokens, vocab], and the ids that it is of."""

    logprobs: torch.Tensor
    ids: tuple[int, ...]

    @classmethod
    def of(cls, logits: np.ndarray, ids: Sequence[int]) -> Expected:
        return cls(_logprobs(logits), tuple(ids))


@dataclass(slots=True)
class Divergence:
    """Of one way to compute: each position's Kullback-Leibler divergence from the reference, in nats, and the negative
    log-likelihoods of the text's next tokens, its own and the reference's."""

    kl: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    expected_nll: list[float] = field(default_factory=list)
    same_best: list[bool] = field(default_factory=list)

    def add(self, expected: Expected, logits: np.ndarray) -> None:
        """`logits` [tokens, vocab] of the window, or of the first tokens of it."""
        count = len(logits)
        got, wanted = _logprobs(logits), expected.logprobs[:count]
        self.kl += (wanted.exp() * (wanted - got)).sum(dim=1).tolist()
        self.same_best += (got.argmax(dim=1) == wanted.argmax(dim=1)).tolist()
        following = expected.ids[1 : count + 1]
        rows = torch.arange(len(following))
        targets = torch.tensor(following, dtype=torch.long)
        self.nll += (-got[rows, targets]).tolist()
        self.expected_nll += (-wanted[rows, targets]).tolist()

    def summary(self) -> dict[str, float]:
        own, reference = _perplexity(self.nll), _perplexity(self.expected_nll)
        return {
            "tokens": len(self.kl),
            "perplexity": round(own, 5),
            "perplexity_above_reference": round(own - reference, 5),
            "kl_mean": float(f"{np.mean(self.kl):.4g}"),
            "kl_p99": float(f"{np.percentile(self.kl, 99):.4g}"),
            "same_best_token": round(float(np.mean(self.same_best)), 4),
        }


def relative_rms(got: np.ndarray, wanted: np.ndarray) -> float:
    """√(Σ(got − wanted)² / Σ wanted²)."""
    error = np.asarray(got, np.float64) - wanted
    return float(np.sqrt((error**2).sum() / (np.asarray(wanted, np.float64) ** 2).sum()))


def _perplexity(nll: Sequence[float]) -> float:
    return math.exp(sum(nll) / len(nll))


def _logprobs(logits: np.ndarray) -> torch.Tensor:
    return torch.log_softmax(torch.from_numpy(logits).double(), dim=-1)
