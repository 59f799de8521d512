from __future__ import annotations

from collections.abc import Sequence

import pytest

from potluck.engine.kv_budget import KVBudget, PrefixCache
from potluck.engine.request import Phase, PrefixReuse, TokenSequence
from transport.messages.ring import Open, Release, Sampling, SequenceId

_PREFIX = tuple(range(100, 140))


def _sequence(number: int, prompt: Sequence[int], *, max_tokens: int = 10) -> TokenSequence:
    return TokenSequence(SequenceId(number), tuple(prompt), Sampling(), max_tokens=max_tokens)


def _opened(budget: KVBudget, number: int, prompt: Sequence[int]) -> TokenSequence:
    """Claimed, opened and computed."""
    sequence = _sequence(number, prompt)
    assert budget.allocate(sequence)
    sequence.move_to(Phase.PREFILL)
    budget.find_prefix(sequence)
    budget.ops_sent()
    sequence.step_sent(sequence.prefill_entry(10**6), 1)
    budget.sequence_opened(sequence)
    return sequence


def _over(budget: KVBudget, number: int, prompt: Sequence[int]) -> TokenSequence:
    sequence = _opened(budget, number, prompt)
    budget.free(sequence, keep_prefix=True)
    return sequence


def test_the_longest_common_beginning_is_found_but_never_a_whole_prompt() -> None:
    directory = PrefixCache(has_window=False)
    directory.add_finished(SequenceId(1), [*_PREFIX, 1, 2, 3])
    directory.add_finished(SequenceId(2), [*_PREFIX, 1, 2, 9])
    assert directory.find([*_PREFIX, 1, 2, 3, 4]) == PrefixReuse(SequenceId(1), 43, moves=True)
    assert directory.find([*_PREFIX, 1, 2, 9, 4]) == PrefixReuse(SequenceId(2), 43, moves=True)
    found = directory.find([*_PREFIX, 1, 2, 3])
    assert found is not None and found.length == 42
    assert directory.find([*_PREFIX[:15], 1]) is None
    assert directory.find([0, *_PREFIX]) is None


def test_a_small_part_is_copied_and_a_large_one_taken_over() -> None:
    directory = PrefixCache(has_window=False)
    directory.add_finished(SequenceId(1), [*_PREFIX, *range(200)])
    found = directory.find([*_PREFIX, 7, 7])
    assert found == PrefixReuse(SequenceId(1), 40, moves=False)


def test_a_running_sequence_lends_what_it_has_sent_and_stays() -> None:
    directory = PrefixCache(has_window=False)
    sequence = _sequence(1, [*_PREFIX, *range(10)])
    sequence.move_to(Phase.PREFILL)
    directory.add_running(sequence)
    assert directory.find([*_PREFIX, 9]) is None
    sequence.step_sent(sequence.prefill_entry(30), 1)
    assert directory.find([*_PREFIX, 9]) == PrefixReuse(SequenceId(1), 30, moves=False)
    sequence.step_sent(sequence.prefill_entry(30), 2)
    assert directory.find([*_PREFIX, 9]) == PrefixReuse(SequenceId(1), 40, moves=False)
    directory.remove(SequenceId(1))
    assert directory.find([*_PREFIX, 9]) is None


def test_where_layers_forget_only_the_end_can_be_used() -> None:
    directory = PrefixCache(has_window=True)
    directory.add_finished(SequenceId(1), [*_PREFIX, *range(64)])
    assert directory.find([*_PREFIX, 99]) == PrefixReuse(SequenceId(1), 40, moves=False)
    directory.add_finished(SequenceId(1), [*_PREFIX, *range(65)])
    assert directory.find([*_PREFIX, 99]) is None
    assert directory.find([*_PREFIX, 0, 99]) == PrefixReuse(SequenceId(1), 41, moves=False)


def test_where_layers_forget_a_running_sequence_lends_only_while_it_is_near() -> None:
    directory = PrefixCache(has_window=True)
    sequence = _sequence(1, _PREFIX, max_tokens=200)
    sequence.move_to(Phase.PREFILL)
    directory.add_running(sequence)
    sequence.step_sent(sequence.prefill_entry(100), 1)
    for number in range(2, 70):
        sequence.step_returned()
        sequence.commit(7)
        sequence.step_sent(sequence.decode_entry(), number)
        is_near = sequence.num_sent - 39 <= 64
        assert (directory.find(_PREFIX) is not None) == is_near


def test_after_a_failure_nothing_is_reused() -> None:
    budget = KVBudget(300, has_window=False, prefix_cache=True)
    _over(budget, 1, range(100))
    again = _sequence(2, range(101))
    again.num_retries = 1
    assert budget.allocate(again)
    budget.find_prefix(again)
    assert again.reuse is None and budget.cached_tokens == 100


def test_the_least_recently_used_goes_first() -> None:
    directory = PrefixCache(has_window=False)
    for number in (1, 2, 3):
        directory.add_finished(SequenceId(number), [number * 1000, *_PREFIX])
    directory.find([1000, *_PREFIX, 5])
    assert [directory.evict(), directory.evict(), directory.evict()] == [2, 3, 1]
    assert directory.cached_tokens == 0


def test_not_more_is_kept_than_can_be_looked_through() -> None:
    directory = PrefixCache(has_window=False)
    gone = [each for number in range(260) for each in directory.add_finished(SequenceId(number), [number, *_PREFIX])]
    assert gone == [0, 1, 2, 3]


def test_what_is_over_is_kept_and_goes_when_memory_is_claimed() -> None:
    budget = KVBudget(200, has_window=False, prefix_cache=True)
    _over(budget, 1, range(100))
    assert (budget.allocated_tokens, budget.cached_tokens, budget.ops) == (0, 100, [])
    other = _sequence(2, range(1000, 1120))
    assert budget.allocate(other)
    assert budget.ops == [Release(SequenceId(1))]
    assert (budget.allocated_tokens, budget.cached_tokens) == (128, 0)


def test_what_a_sequence_takes_over_is_not_evicted_for_it() -> None:
    budget = KVBudget(200, has_window=False, prefix_cache=True)
    _over(budget, 1, range(100))
    second = _opened(budget, 2, [*range(100), *range(500, 590)])
    assert (second.num_cached, budget.allocated_tokens, budget.cached_tokens, budget.ops) == (100, 192, 0, [])
    budget.free(second, keep_prefix=False)
    assert budget.ops == [Release(SequenceId(2))]
    assert (budget.allocated_tokens, budget.cached_tokens) == (0, 0)


def test_one_that_never_opens_releases_what_it_would_have_taken_over() -> None:
    budget = KVBudget(200, has_window=False, prefix_cache=True)
    _over(budget, 1, range(100))
    second = _sequence(2, range(101))
    assert budget.allocate(second)
    budget.free(second, keep_prefix=True)
    assert budget.ops == [Release(SequenceId(1))]
    assert (budget.allocated_tokens, budget.cached_tokens) == (0, 0)


def test_a_claim_counts_what_it_takes_over_and_more_than_there_is_is_refused() -> None:
    budget = KVBudget(200, has_window=False, prefix_cache=True)
    _over(budget, 1, range(160))
    taking = _sequence(2, [*range(125), 7])  # claims 128, but until it opens, it holds 160
    assert budget.allocate(taking)
    assert budget.allocated_tokens == 160
    other = _sequence(3, range(300, 350))
    assert not budget.allocate(other)
    assert (budget.allocated_tokens, other.allocated_tokens) == (160, 0)


def test_nothing_is_kept_where_it_should_not_be() -> None:
    budget = KVBudget(200, has_window=False, prefix_cache=False)
    _over(budget, 1, range(100))
    assert budget.ops == [Release(SequenceId(1))]
    assert _opened(budget, 2, range(101)).num_cached == 0


@pytest.mark.parametrize("is_kept", [True, False])
def test_after_a_failed_step_nothing_of_it_is_trusted(is_kept: bool) -> None:
    budget = KVBudget(300, has_window=False, prefix_cache=True)
    sequence = _opened(budget, 1, range(100))
    if is_kept:
        budget.free(sequence, keep_prefix=True)
    budget.step_failed((Release(SequenceId(9)), Open(SequenceId(1), tuple(range(100)), Sampling())))
    wanted = [Release(SequenceId(9))] + ([Release(SequenceId(1))] if is_kept else [])
    assert budget.ops == wanted and budget.cached_tokens == 0
