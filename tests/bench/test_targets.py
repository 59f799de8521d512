"""Ratios are taken within a round, missing systems leave their targets out, and the median decides."""

from __future__ import annotations

from bench.targets import Target, agreement, is_met, judge_targets, medians, over_best, ratio

TARGET = Target(name="speed", limit=2.0, sense="at least", value=ratio("ours", "theirs"))


def test_the_median_of_ratios_within_rounds_decides() -> None:
    # The machine slows down tenfold: a ratio over all rounds would say 0.3.
    rounds = [{"ours": 30.0, "theirs": 10.0}, {"ours": 3.0, "theirs": 1.0}, {"ours": 1.0, "theirs": 1.0}]
    assert judge_targets(rounds, [TARGET]) == [
        {"what": "speed", "median": 3.0, "min_max": [1.0, 3.0], "at least": 2.0, "met": True}
    ]
    assert not judge_targets([{"ours": 1.9, "theirs": 1.0}], [TARGET])[0]["met"]


def test_at_most_is_the_other_way_round() -> None:
    assert is_met(1.0, 1.2, "at most") and not is_met(1.3, 1.2, "at most")


def test_what_has_no_limit_is_only_told() -> None:
    told = Target(name="speed", limit=None, sense="at least", value=ratio("ours", "theirs"))
    assert judge_targets([{"ours": 1.0, "theirs": 2.0}], [told]) == [
        {"what": "speed", "median": 0.5, "min_max": [0.5, 0.5]}
    ]


def test_without_a_contestant_its_targets_are_left_out() -> None:
    assert judge_targets([{"ours": 1.0}], [TARGET]) == []
    assert over_best("first 512", min)({"potluck first 512": 1.0}) is None


def test_the_best_peer_may_be_another_one_in_each_round() -> None:
    value = over_best("first 512", min)
    found = {"potluck first 512": 1.0, "llama.cpp first 512": 4.0, "llama.cpp Q8_0 first 512": 0.5}
    assert value(found) == 2.0
    assert value({**found, "llama.cpp Q4_0 first 512": 0.25}) == 4.0
    assert (
        over_best("decode", max)({"potluck decode": 3.0, "llama.cpp decode": 1.0, "llama.cpp Q4_0 decode": 2.0}) == 1.5
    )


def test_medians_and_agreement() -> None:
    assert medians([{"a": 1.0}, {"a": 5.0}, {"a": 2.0}]) == {"a": 2.0}
    assert agreement([1, 2, 3], [1, 2, 4]) == 2
    assert agreement([1, 2], [1, 2, 3]) == 2
