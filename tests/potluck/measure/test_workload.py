"""Load that can be repeated: arrivals by seed, messages that no cache knows, lengths in their shares."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter

import pytest

from potluck.measure.load_run import ChatGenerator, ChatMix, fit, line, poisson_arrivals, tag


def first(count: int, rate_per_s: float, seed: int) -> list[float]:
    return list(itertools.islice(poisson_arrivals(rate_per_s, seed), count))


def test_arrivals_are_those_of_their_seed() -> None:
    assert first(100, 5.0, 1) == first(100, 5.0, 1) != first(100, 5.0, 2)


def test_arrivals_are_a_poisson_process() -> None:
    at_s = first(20_000, 4.0, 3)
    gaps = [after - before for before, after in itertools.pairwise([0.0, *at_s])]
    assert min(gaps) >= 0.0
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.03)
    # Exponential gaps: as wide as their mean, and as many arrivals vary as there are.
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.03)
    counts = Counter(int(each) for each in at_s if each < 4000)
    per_second = [counts[second] for second in range(4000)]
    assert statistics.variance(per_second) == pytest.approx(4.0, rel=0.1)


def chats(mix: ChatMix, *, seed: int = 0, salt: int = 0) -> ChatGenerator:
    return ChatGenerator(mix, lambda tokens: tokens, seed=seed, salt=salt)


def test_messages_differ_from_the_first_word_on_also_between_runs() -> None:
    mix = ChatMix(lengths=((20, 1.0),), output=4, turns=2)
    texts = [
        message.text for salt in (0, 500) for chat in itertools.islice(chats(mix, salt=salt), 100) for message in chat
    ]
    assert len({text.split()[0] for text in texts}) == len(texts) == 400
    assert len({tag(number) for number in range(10_000)}) == 10_000


def test_the_same_seed_gives_the_same_lengths_and_words() -> None:
    mix = ChatMix(lengths=((8, 3.0), (40, 1.0)), output=4)

    def of(seed: int, salt: int) -> list[tuple[int, list[str]]]:
        return [(m.tokens, m.text.split()[1:]) for (m,) in itertools.islice(chats(mix, seed=seed, salt=salt), 400)]

    assert of(1, 0) == of(1, 77) != of(2, 0)
    lengths = Counter(tokens for tokens, _ in of(1, 0))
    assert lengths[8] / 400 == pytest.approx(0.75, abs=0.08)
    assert all(len(words) == tokens for tokens, words in of(1, 0))


def test_a_shared_prefix_is_shared_and_part_of_the_length() -> None:
    mix = ChatMix(lengths=((50, 1.0),), output=4, shared_prefix=10)
    one, two = [chat[0].text.split() for chat in itertools.islice(chats(mix), 2)]
    assert one[:10] == two[:10] and one[10] != two[10]
    assert len(one) == len(two) == 51
    assert next(chats(mix, salt=1))[0].text.split()[:10] != one[:10]


def test_words_for_a_length() -> None:
    assert fit(100, lambda words: 30 + words) == 70
    assert fit(100, lambda words: 30 + 2 * words) == 35
    assert fit(20, lambda words: 30 + words) == 0
    words_of = line((8, 136), [30 + 8, 30 + 136])
    assert words_of is not None and (words_of(130), words_of(5)) == (100, 0)
    assert line((8, 136), [50, 50]) is None
