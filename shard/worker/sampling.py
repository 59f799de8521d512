"""Picks tokens from logits, without state: the same ids, settings and position always give the same token.

Filters in this order: repetition penalty, presence and frequency penalties, logit bias, temperature, top-k, top-p,
min-p.
Logprobs are of the model's own distribution, before all of these.
"""

from __future__ import annotations

import numpy as np

from transport.errors import StageFailed
from transport.messages.ring import SampledToken, Sampling

_MASK_64 = (1 << 64) - 1


def sample(logits: np.ndarray, history: np.ndarray, num_prompt: int, sampling: Sampling, position: int) -> SampledToken:
    """The token for `position`, from logits [vocab] float32 and the ids before it.

    `history` holds the prompt's ids, `num_prompt` of them, then the generated ones. Equal scores go to the lowest id.
    Raises StageFailed where the logits are not numbers.
    """
    adjusted = _apply_penalties(logits, history, num_prompt, sampling)
    best = int(adjusted.argmax())
    # argmax finds the first nan or +inf, and -inf only where there is nothing else: one look checks them all.
    if not np.isfinite(adjusted[best]):
        raise StageFailed(
            f"the model gave a logit of {adjusted[best]} for position {position}",
            hint="float16 may be too narrow for this model: use bfloat16 or float32",
        )
    if sampling.temperature == 0:
        token_id = best
    else:
        ids, weights = _filter(adjusted, adjusted[best], sampling)
        token_id = _draw(ids, weights, uniform(sampling.seed, sampling.choice, position))
    if sampling.top_logprobs is None:
        return SampledToken(token_id)
    logprob, top = _logprobs(logits, token_id, sampling.top_logprobs)
    return SampledToken(token_id, logprob, top)


def distribution(
    logits: np.ndarray, history: np.ndarray, num_prompt: int, sampling: Sampling
) -> tuple[np.ndarray, np.ndarray]:
    """Ids that `sample` may pick at this temperature (above 0), and their probabilities."""
    adjusted = _apply_penalties(logits, history, num_prompt, sampling)
    ids, weights = _filter(adjusted, adjusted.max(), sampling)
    return ids, weights / weights.sum()


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on these three only (Philox 4×64, Salmon et al. 2011). Any integers will do."""
    key = (seed & _MASK_64) | (choice & _MASK_64) << 64
    bits = np.random.Philox(key=key, counter=position & _MASK_64).random_raw()
    return float(int(bits) >> 11) * 2.0**-53


def _apply_penalties(logits: np.ndarray, history: np.ndarray, num_prompt: int, sampling: Sampling) -> np.ndarray:
    """Logits after penalties and bias: the logits themselves where there are none."""
    repetition, presence, frequency = (
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    )
    if repetition == 1 and presence == 0 and frequency == 0 and not sampling.logit_bias:
        return logits
    adjusted = logits.copy()
    if repetition != 1:  # Keskar et al. 2019, as transformers has it: over prompt and generated ids.
        seen = np.unique(history)
        scores = adjusted[seen]
        adjusted[seen] = np.where(scores < 0, scores * repetition, scores / repetition)
    if presence != 0 or frequency != 0:  # As OpenAI's API defines them: over generated ids only.
        generated, counts = np.unique(history[num_prompt:], return_counts=True)
        adjusted[generated] -= presence + frequency * counts
    for token_id, bias in sampling.logit_bias.items():
        adjusted[token_id] += bias
    return adjusted


def _filter(scores: np.ndarray, peak: np.floating, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The ids that pass temperature, top-k, top-p and min-p, and their weights relative to the best one's 1.

    Sorted by weight only where a filter needs it.
    """
    with np.errstate(over="ignore"):  # A tiny temperature sends all but the best to -inf, as it should.
        scaled = (scores - peak) / np.float32(max(sampling.temperature, 1e-30))
    ids = np.arange(scores.size)
    is_sorted = False
    if 0 < sampling.top_k < scores.size:
        ids = _top_k(scaled, sampling.top_k)
        scaled = scaled[ids]
        is_sorted = True
    weights = np.exp(scaled)
    if sampling.top_p < 1:
        total = weights.sum(dtype=np.float64)
        if not is_sorted:
            likely = _top_p_candidates(weights, sampling.top_p, total)
            order = likely[np.argsort(-weights[likely], kind="stable")]
            ids, weights = ids[order], weights[order]
        before = np.cumsum(weights, dtype=np.float64) - weights
        kept = max(1, int(np.count_nonzero(before < sampling.top_p * total)))
        ids, weights = ids[:kept], weights[:kept]
    if sampling.min_p > 0:
        passed = weights >= sampling.min_p * weights.max()
        ids, weights = ids[passed], weights[passed]
    return ids, weights


def _top_p_candidates(weights: np.ndarray, top_p: float, total: float) -> np.ndarray:
    """Few ids, in order, among which are all that top-p keeps: sorting the whole vocabulary would take 20 ms."""
    likely = np.flatnonzero(weights >= 1e-3)
    if weights[likely].sum(dtype=np.float64) < top_p * total:
        # Weights below this are together less than 1 - top_p of the total, so none of them is needed.
        likely = np.flatnonzero(weights >= (1 - top_p) * total / weights.size)
    return likely


def _top_k(scores: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` highest scores, highest first, equal ones by id."""
    if count >= scores.size:
        return np.argsort(-scores, kind="stable")
    threshold = np.partition(scores, scores.size - count)[scores.size - count]
    ids = np.flatnonzero(scores >= threshold)
    return ids[np.argsort(-scores[ids], kind="stable")][:count]


def _draw(ids: np.ndarray, weights: np.ndarray, number: float) -> int:
    """The id where the cumulated weights pass `number` of their sum; never one of weight 0."""
    cumulated = np.cumsum(weights, dtype=np.float64)
    index = int(np.searchsorted(cumulated, number * cumulated[-1], side="right"))
    if index == ids.size:  # Rounding can reach the sum itself.
        index = int(np.flatnonzero(weights)[-1])
    return int(ids[index])


def _logprobs(logits: np.ndarray, token_id: int, num_top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The token's log probability and the `num_top` highest, under the model's own distribution."""
    peak = logits.max()
    log_total = float(peak) + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))
    top = _top_k(logits, num_top) if num_top > 0 else ()
    return float(logits[token_id]) - log_total, tuple((int(i), float(logits[i]) - log_total) for i in top)
