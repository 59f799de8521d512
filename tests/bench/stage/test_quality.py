"""Divergences against sums written out, and windows that cover the text."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.stage.quality import LLAMA, PREFILL, Divergence, ReferenceWindow, claims, windows_of


def logits(*rows: list[float]) -> np.ndarray:
    return np.log(np.array(rows, np.float32))


def test_divergence_and_perplexity_of_two_positions() -> None:
    expected = ReferenceWindow.of(logits([0.5, 0.25, 0.25], [0.5, 0.5, 0.0001]), [0, 1, 2][:2])
    found = Divergence()
    # Logits may be off by a constant: only the distribution counts.
    found.add(expected, logits([0.25, 0.5, 0.25], [0.5, 0.5, 0.0001]) + 3.0)
    assert found.kl == pytest.approx([0.5 * math.log(2) - 0.25 * math.log(2), 0.0], abs=1e-6)
    # Only the first position has a next token: id 1.
    assert math.exp(found.nll[0]) == pytest.approx(2.0) and math.exp(found.expected_nll[0]) == pytest.approx(4.0)
    summary = found.summary()
    assert (summary["tokens"], summary["perplexity"], summary["same_best_token"]) == (2, 2.0, 0.5)
    assert summary["perplexity_above_reference"] == pytest.approx(-2.0, abs=1e-4)


def test_the_first_tokens_of_a_window_are_compared_with_themselves() -> None:
    rows = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    expected = ReferenceWindow.of(rows, [1, 2, 3, 4, 5])
    found = Divergence()
    found.add(expected, rows[:3])
    assert np.abs(found.kl).max() < 1e-12
    assert found.nll == found.expected_nll and len(found.nll) == 3


def test_windows_cover_the_text_and_begin_as_texts_do() -> None:
    assert windows_of(([], list(range(10))), 8, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows_of(([], list(range(9))), 9, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows_of(([99], list(range(6))), 6, 4) == [[99, 0, 1, 2], [99, 3, 4, 5]]


def test_claims_fail_where_ours_is_worse() -> None:
    fact = {"kl_mean": 1.0, "kl_p99": 1.0, "perplexity_above_reference": 1.0}
    ways = {PREFILL: {**fact, "kl_p99": 2.0}, LLAMA: fact}
    assert [row["met"] for row in claims(ways)] == [True, False, True]
    assert claims({PREFILL: fact}) == []
