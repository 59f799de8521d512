"""Sampling against a naive reference, and against the distribution it claims to draw from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shard.worker.sampling import distribution, sample, uniform
from transport.errors import StageFailed
from transport.messages.ring import Sampling

VOCAB = 24
NO_HISTORY = np.array([], dtype=np.int64)

# Few distinct values, so that ties are common.
logit_arrays = st.lists(
    st.sampled_from([-6.0, -2.5, -1.0, 0.0, 0.5, 1.0, 3.0, 9.0]), min_size=VOCAB, max_size=VOCAB
).map(lambda values: np.array(values, dtype=np.float32))
histories = st.lists(st.integers(0, VOCAB - 1), max_size=12).map(lambda ids: np.array(ids, dtype=np.int64))
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.25, 0.7, 1.0, 2.0]),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0]),
    top_k=st.sampled_from([0, 1, 5, VOCAB, 100]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.0, 5.0]), max_size=3),
    seed=st.integers(-(2**63), 2**64 - 1),
)


def naive_scores(logits: np.ndarray, history: np.ndarray, num_prompt: int, sampling: Sampling) -> np.ndarray:
    scores = logits.astype(np.float64)
    for token in {int(i) for i in history}:
        scores[token] *= sampling.repetition_penalty if scores[token] < 0 else 1 / sampling.repetition_penalty
    generated = [int(i) for i in history[num_prompt:]]
    for token in set(generated):
        scores[token] -= sampling.presence_penalty + sampling.frequency_penalty * generated.count(token)
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    return scores


def naive_probabilities(logits: np.ndarray, history: np.ndarray, num_prompt: int, sampling: Sampling) -> np.ndarray:
    """One filter after another over the whole vocabulary, renormalised after each."""
    scores = naive_scores(logits, history, num_prompt, sampling) / sampling.temperature
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    ranked = sorted(range(VOCAB), key=lambda token: (-probabilities[token], token))
    if sampling.top_k:
        for token in ranked[sampling.top_k :]:
            probabilities[token] = 0
        probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        before = 0.0
        for rank, token in enumerate(ranked):
            assume(
                rank == 0 or abs(before - sampling.top_p) > 1e-6
            )  # float32 and float64 may take either side of an edge
            dropped = rank > 0 and before >= sampling.top_p
            before += probabilities[token]
            if dropped:
                probabilities[token] = 0
        probabilities /= probabilities.sum()
    ratios = probabilities / probabilities.max()
    assume(sampling.min_p == 0 or bool(np.all(np.abs(ratios - sampling.min_p) > 1e-6)))
    probabilities[ratios < sampling.min_p] = 0
    return probabilities / probabilities.sum()


@settings(max_examples=400, deadline=None)
@given(logit_arrays, histories, st.integers(0, 12), samplings)
def test_filters_match_the_naive_reference(
    logits: np.ndarray, history: np.ndarray, num_prompt: int, sampling: Sampling
) -> None:
    num_prompt = min(num_prompt, history.size)
    ids, probabilities = distribution(logits, history, num_prompt, sampling)
    got = np.zeros(VOCAB)
    got[ids] = probabilities
    wanted = naive_probabilities(logits, history, num_prompt, sampling)
    assert np.abs(got - wanted).max() < 1e-5


@settings(max_examples=200, deadline=None)
@given(logit_arrays, histories, samplings)
def test_zero_temperature_is_argmax_and_the_lowest_id_wins_a_tie(
    logits: np.ndarray, history: np.ndarray, sampling: Sampling
) -> None:
    greedy = Sampling(
        temperature=0, repetition_penalty=sampling.repetition_penalty, presence_penalty=sampling.presence_penalty
    )
    scores = naive_scores(logits, history, 0, greedy)
    token = sample(logits, history, 0, greedy, position=history.size).token_id
    assert scores[token] == pytest.approx(scores.max(), abs=1e-5)
    assert sample(logits, NO_HISTORY, 0, Sampling(temperature=0), 0).token_id == int(
        np.flatnonzero(logits == logits.max())[0]
    )


@settings(max_examples=200, deadline=None)
@given(logit_arrays, histories, samplings, st.integers(0, 2**31))
def test_a_token_depends_only_on_ids_settings_and_position(
    logits: np.ndarray, history: np.ndarray, sampling: Sampling, position: int
) -> None:
    first = sample(logits, history, 0, sampling, position)
    assert sample(logits.copy(), history.copy(), 0, sampling, position) == first
    assert first.token_id in distribution(logits, history, 0, sampling)[0]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.6, top_p=0.9),
        Sampling(temperature=1.4, top_k=6, min_p=0.05),
        Sampling(frequency_penalty=0.7, logit_bias={3: 2.0}),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    """Chi-square over 20,000 positions: below mean + 4 standard deviations of its own distribution."""
    logits = np.random.default_rng(5).normal(size=VOCAB).astype(np.float32) * 2
    history = np.array([1, 2, 3, 3, 4], dtype=np.int64)
    ids, probabilities = distribution(logits, history, 2, sampling)
    draws = 20_000
    drawn = [sample(logits, history, 2, sampling, position).token_id for position in range(draws)]
    counts = np.bincount(drawn, minlength=VOCAB)
    assert counts.sum() == counts[ids].sum()
    likely = probabilities * draws >= 5
    expected = probabilities[likely] * draws
    chi_square = float(((counts[ids][likely] - expected) ** 2 / expected).sum())
    freedom = int(likely.sum()) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_random_numbers_differ_by_seed_choice_and_position() -> None:
    numbers = {
        uniform(seed, choice, position)
        for seed in (-1, 0, 1, 2**63, 2**64 - 2)
        for choice in (0, 1)
        for position in range(50)
    }
    assert len(numbers) == 5 * 2 * 50
    assert all(0 <= number < 1 for number in numbers)
    assert abs(np.mean([uniform(7, 0, position) for position in range(4000)]) - 0.5) < 0.02


def test_logprobs_are_of_the_distribution_before_temperature_and_filters() -> None:
    logits = np.array([1.0, 3.0, 2.0, 3.0], dtype=np.float32)
    sampling = Sampling(temperature=0.1, top_k=1, logit_bias={0: 50.0}, top_logprobs=3)
    token = sample(logits, NO_HISTORY, 0, sampling, 0)
    log_softmax = logits - np.log(np.exp(logits).sum())
    assert token.token_id == 0
    assert token.logprob == pytest.approx(log_softmax[0], abs=1e-5)
    assert [i for i, _ in token.top] == [1, 3, 2]
    assert [value for _, value in token.top] == pytest.approx(log_softmax[[1, 3, 2]], abs=1e-5)
    assert sample(logits, NO_HISTORY, 0, Sampling(top_logprobs=0), 0).top == ()
    assert sample(logits, NO_HISTORY, 0, Sampling(), 0).logprob is None


def test_large_vocabularies_take_the_same_way() -> None:
    """Flat, peaked, and one peak over a heavy tail: the shortcut before sorting never loses an id of the nucleus."""
    normal = np.random.default_rng(2).normal(size=262_144).astype(np.float32)
    peak = np.where(np.arange(262_144) == 5, np.float32(9.5), np.float32(0.01) * normal)
    for logits in (normal * np.float32(0.01), normal, normal * np.float32(4), peak):
        probabilities = np.exp(logits.astype(np.float64) - logits.max())
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        kept = int(np.count_nonzero(np.cumsum(probabilities[order]) - probabilities[order] < 0.9))
        ids, _ = distribution(logits, NO_HISTORY, 0, Sampling(top_p=0.9))
        assert abs(ids.size - kept) <= 1 + kept // 10_000
        assert set(ids[: kept - 20].tolist()) <= set(order[: kept + 20].tolist())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_an_error(bad: float, temperature: float) -> None:
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[7] = bad
    with pytest.raises(StageFailed, match="position 3"):
        sample(logits, NO_HISTORY, 0, Sampling(temperature=temperature), 3)


def test_masked_ids_are_never_drawn() -> None:
    logits = np.full(VOCAB, -np.inf, dtype=np.float32)
    logits[[4, 9]] = 0
    drawn = {sample(logits, NO_HISTORY, 0, Sampling(), position).token_id for position in range(200)}
    assert drawn == {4, 9}


def test_extreme_temperatures() -> None:
    logits = np.arange(VOCAB, dtype=np.float32)
    assert sample(logits, NO_HISTORY, 0, Sampling(temperature=1e-40), 0).token_id == VOCAB - 1
    assert distribution(logits, NO_HISTORY, 0, Sampling(temperature=1e30))[1] == pytest.approx(1 / VOCAB)
