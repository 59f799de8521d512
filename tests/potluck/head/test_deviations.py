"""Predicted against measured: what lasts is told from what passes, and what is learned fades."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.measurements import DeviceTimes
from potluck.head.plan_watch import (
    PERSISTS_S,
    PERSISTS_STEPS,
    Deviation,
    LearnedFactor,
    Observed,
    factor_at,
    learn,
    observe,
    scale_times,
    update_deviation,
)
from shard.worker.serve import StageCounters
from tests.support.planner.pool import device
from transport.messages.control import DecodeBucket, Stats
from transport.messages.measure import Grid, LayerTimes
from transport.messages.ring import Entry, SequenceId

DAY_S = 86400.0


def steps_at(ratio: float, num_steps: int = 20) -> Observed:
    return Observed(num_steps=num_steps, measured_s=ratio * num_steps, predicted_s=float(num_steps))


def entries(count: int, start: int) -> tuple[Entry, ...]:
    return tuple(Entry(SequenceId(i), start, (1,), 1) for i in range(count))


def stats(clock: StageCounters) -> Stats:
    return Stats(token=1, rss_bytes=0, decode_buckets=clock.buckets())


@given(
    rounds=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2000)), min_size=8, max_size=60),
    before=st.integers(0, 7),
    slow=st.floats(0.2, 5),
)
def test_a_stage_that_is_slower_by_a_factor_is_seen_so(rounds: list[tuple[int, int]], before: int, slow: float) -> None:
    """Whatever the mix of batches and contexts: predictions are linear within a bucket."""

    def predict(rows: float, context: float) -> float:
        return 1e-3 + rows * (1e-4 + 1e-7 * context)

    clock = StageCounters()
    for _ in range(before):
        clock.add(entries(3, 5), 123.0)
    first = stats(clock)
    for rows, context in rounds:
        clock.add(entries(rows, context), slow * predict(rows, context))
        clock.add((Entry(SequenceId(1), 0, (1, 2, 3), 0),), 99.0)  # A prompt is not decode.
    seen = observe(first, stats(clock), predict)
    assert seen is not None and seen.num_steps == len(rounds)
    # Rows and contexts of a bucket are averaged apart: their product is not exact.
    assert seen.ratio == pytest.approx(slow, rel=0.15)


def test_too_few_steps_or_a_new_load_say_nothing() -> None:
    clock = StageCounters()
    clock.add(entries(1, 10), 0.1)
    assert observe(None, stats(clock), lambda rows, context: 0.1) is None
    for _ in range(20):
        clock.add(entries(1, 10), 0.1)
    assert observe(stats(clock), stats(StageCounters()), lambda rows, context: 0.1) is None
    assert observe(None, stats(clock), lambda rows, context: 0.1) is not None
    assert observe(stats(clock), stats(clock), lambda rows, context: 0.1) is None
    fewer = StageCounters()
    fewer.add(entries(1, 10), 0.1)
    assert observe(stats(clock), stats(fewer), lambda rows, context: 0.1) is None


def test_buckets_are_powers_of_two() -> None:
    clock = StageCounters()
    for count in (1, 2, 3, 4, 5, 8, 9):
        clock.add(entries(count, 100), 0.5)
    assert [(one.largest_rows, one.steps, one.rows) for one in clock.buckets()] == [
        (1, 1, 1),
        (2, 1, 2),
        (4, 2, 7),
        (8, 2, 13),
        (16, 1, 9),
    ]
    assert clock.buckets()[2] == DecodeBucket(largest_rows=4, steps=2, rows=7, context_tokens=700, seconds=1.0)


def follow(ratios: list[float], every_s: float = 10.0, num_steps: int = 20) -> Deviation:
    deviation = Deviation()
    for index, ratio in enumerate(ratios):
        deviation = update_deviation(deviation, steps_at(ratio, num_steps), index * every_s)
    return deviation


def test_a_game_that_starts_is_noticed_after_a_while() -> None:
    looks = int(PERSISTS_S / 10) + 1
    assert not follow([1.6] * (looks - 1)).persists((looks - 2) * 10.0)
    deviation = follow([1.0] * 5 + [1.6] * looks)
    assert deviation.persists((looks + 4) * 10.0)
    assert deviation.ratio == pytest.approx(1.6)


def test_few_steps_prove_nothing_however_long() -> None:
    assert not follow([2.0] * 20, every_s=600.0, num_steps=PERSISTS_STEPS // 20 - 1).persists(1e6)


@given(st.lists(st.floats(0.81, 1.24), min_size=1, max_size=50))
def test_what_is_near_the_prediction_never_persists(ratios: list[float]) -> None:
    deviation = follow(ratios, every_s=PERSISTS_S, num_steps=PERSISTS_STEPS)
    assert deviation.since_s is None and not deviation.persists(1e9)


def test_too_slow_and_then_too_fast_begins_anew() -> None:
    deviation = follow([2.0] * 10 + [0.4])
    assert deviation.since_s == 100.0
    assert deviation.ratio == pytest.approx(0.4)


def test_no_news_changes_nothing() -> None:
    deviation = follow([2.0] * 3)
    assert update_deviation(deviation, None, 1e9) == deviation


@given(truth=st.floats(0.2, 5))
def test_learning_arrives_at_the_truth(truth: float) -> None:
    learned = None
    for second in range(40):
        learned = learn(learned, truth / factor_at(learned, second), float(second))
    assert factor_at(learned, 40.0) == pytest.approx(truth, rel=0.02)


@given(factor=st.floats(0.1, 10), days=st.floats(0, 100))
def test_what_was_learned_fades(factor: float, days: float) -> None:
    learned = LearnedFactor(factor=factor, at_s=1000.0)
    left = factor_at(learned, 1000.0 + days * DAY_S)
    assert min(1.0, factor) * 0.999 <= left <= max(1.0, factor) * 1.001
    assert factor_at(learned, 1000.0 + 30 * DAY_S) == pytest.approx(1.0, abs=1e-3)
    assert factor_at(learned, 0.0) == factor  # A clock that went back.


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_nonsense_from_a_file_is_not_learned_from(factor: float) -> None:
    assert factor_at(LearnedFactor(factor=factor, at_s=0.0), 1.0) == 1.0


def test_a_correction_scales_all_times() -> None:
    def grid(seconds: float) -> Grid:
        return Grid(rows=(1, 2), contexts=(0,), seconds=((seconds,), (2 * seconds,)))

    times = DeviceTimes(
        device=device("cpu"),
        kinds=(0, 0),
        layers=(LayerTimes(decode=grid(1.0), prefill=grid(3.0)),),
        embed=grid(0.1),
        head=grid(5.0),
        step_s=0.5,
        busy=1.5,
    )
    slower = scale_times(times, 2.0)
    assert slower.layers[0].decode.seconds == ((2.0,), (4.0,))
    assert slower.layers[0].prefill.seconds == ((6.0,), (12.0,))
    assert (slower.embed.seconds[0][0], slower.head.seconds[0][0], slower.step_s) == (0.2, 10.0, 1.0)
    assert (slower.busy, slower.device, slower.kinds) == (times.busy, times.device, times.kinds)
    same: Any = scale_times(times, 1.0)
    assert same is times
