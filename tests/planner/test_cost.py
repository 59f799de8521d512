"""Predictions are those of the formulas, written out again."""

from __future__ import annotations

import random

import pytest

from planner.cost import CostModel, PlacedStage, predict, seconds_at, trip_s, ttft_s
from planner.measurements import DeviceTimes, LinkTimes, PoolTimes
from planner.options import Workload
from planner.plan import stage_times
from tests.support.planner.pool import device, model
from tests.support.planner.random_pools import random_pool, random_profile
from transport.messages.measure import Grid, LayerTimes


def flat(seconds: float) -> Grid:
    return Grid(rows=(1,), contexts=(0,), seconds=((seconds,),))


def times(name: str, layer_s: float, busy: float = 1.0, **changes: object) -> DeviceTimes:
    return DeviceTimes(
        device=device(name, **changes),
        kinds=(0,) * 8,
        layers=(LayerTimes(decode=flat(layer_s), prefill=flat(10 * layer_s)),),
        embed=flat(0.001),
        head=flat(0.002),
        step_s=0.0005,
        busy=busy,
    )


def ring(*devices: DeviceTimes, **work: int) -> CostModel:
    hosts = {each.device.host for each in devices} | {"here"}
    links = [LinkTimes(source=a, target=b, hop_s=0.003, hop_p95_s=0.003, bytes_per_s=1e6) for a in hosts for b in hosts]
    return CostModel(model(), PoolTimes(head="here", devices=devices, links=tuple(links)), Workload(**work))


HALVES = (PlacedStage(0, 0, 4), PlacedStage(1, 4, 8))


def test_a_token_is_stages_and_hops() -> None:
    costs = ring(times("a", 0.01), times("b", 0.02))
    hidden_s = 64 * 2 / 1e6
    expected_s = 4 * 0.01 + 0.001 + 0.0005 + 4 * 0.02 + 0.002 + 0.0005 + 3 * 0.003 + hidden_s
    assert trip_s(costs, HALVES, 1) == pytest.approx(expected_s)
    assert predict(costs, HALVES).tokens_per_s == pytest.approx(1 / expected_s)


def test_equal_chunks_are_pipelined() -> None:
    costs = ring(times("a", 0.01), times("b", 0.02), prompt_tokens=1024, output_tokens=1, chunk_tokens=256)
    first, second = 4 * 0.1 + 0.0015, 4 * 0.2 + 0.0005
    hidden_s = 256 * 64 * 2 / 1e6
    # Two stages, so two chunks under way: the second stage is the one that never waits.
    assert ttft_s(costs, HALVES) == pytest.approx(first + 4 * second + 0.002 + 3 * 0.003 + hidden_s, rel=0.1)
    assert ttft_s(costs, (PlacedStage(0, 0, 8),)) == pytest.approx(4 * (8 * 0.1 + 0.0015 + 0.006) + 0.002)


def test_groups_fill_the_ring() -> None:
    costs = ring(times("a", 0.01), times("b", 0.02), concurrency=4)
    found = predict(costs, HALVES)
    assert (found.group_size, found.num_groups) == (2, 2)
    assert found.tokens_per_s_many == pytest.approx(4 / (2 * (4 * 0.02 + 0.0025)))
    assert found.limit == "the speed of b"


def test_devices_of_a_bus_slow_each_other_only_when_both_work() -> None:
    ram = {"memory_pool": "ram"}
    alone = ring(times("a", 0.01, 2.0, **ram), times("b", 0.02, 2.0, **ram), concurrency=1)
    both = ring(times("a", 0.01, 2.0, **ram), times("b", 0.02, 2.0, **ram), concurrency=2)
    assert predict(both, HALVES).token_s == pytest.approx(predict(alone, HALVES).token_s)
    assert predict(both, HALVES).tokens_per_s_many == pytest.approx(2 / (2 * 2 * (4 * 0.02 + 0.0025)))
    assert predict(both, (PlacedStage(0, 0, 8),)).tokens_per_s_many == pytest.approx(2 / (0.08 + 0.0035 + 0.006))


def test_between_and_beyond_points() -> None:
    grid = Grid(rows=(1, 3), contexts=(0, 10), seconds=((1.0, 2.0), (3.0, 6.0)))
    assert seconds_at(grid, 1, 0) == 1
    assert seconds_at(grid, 2, 5) == 3
    assert seconds_at(grid, 5, 20) == pytest.approx(3 + 2 * (9 - 3))
    assert seconds_at(flat(4.0), 7, 70) == 4
    falling = Grid(rows=(1, 2), contexts=(0,), seconds=((2.0,), (1.0,)))
    assert seconds_at(falling, 9, 0) == 0


def test_memory_never_shrinks_as_a_span_grows() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        profile = random_profile(rng, 6)
        costs = CostModel(profile, random_pool(rng, profile, 2), Workload(concurrency=2))
        for first in range(6):
            for last in range(first + 1, 6):
                wider = costs.memory_bytes(0, first, last + 1), costs.memory_bytes(0, max(0, first - 1), last)
                assert min(wider) >= costs.memory_bytes(0, first, last)


def test_stage_times_are_those_of_busy_stages() -> None:
    costs = ring(
        times("a", 0.01, busy=1.5, memory_pool="ram"), times("b", 0.02, busy=2.0, memory_pool="ram"), context_tokens=64
    )
    first, last = stage_times(costs, HALVES)
    assert dict(first.decode) == pytest.approx(dict.fromkeys((1, 2, 4, 8, 16, 32), 1.5 * (4 * 0.01 + 0.0015)))
    assert dict(last.decode)[4] == pytest.approx(2 * (4 * 0.02 + 0.002 + 0.0005))
    assert {before for _, before, _ in first.prefill} == {0, 16, 32, 64}
    assert len(first.prefill) == 7 * 4
    # A chunk in the middle of a prompt wants no logits.
    assert {round(seconds, 9) for _, _, seconds in last.prefill} == {round(2 * (4 * 0.2 + 0.0005), 9)}
    (alone,) = stage_times(costs, (PlacedStage(0, 0, 8),))
    assert dict(alone.decode)[1] == pytest.approx(8 * 0.01 + 0.001 + 0.002 + 0.0005)


def test_stage_times_follow_what_was_measured() -> None:
    rng = random.Random(3)
    profile = random_profile(rng, 6)
    pool = random_pool(rng, profile, 2)
    costs = CostModel(profile, pool, Workload(context_tokens=2048))
    (found,) = stage_times(costs, (PlacedStage(0, 0, profile.num_layers),))
    assert dict(found.decode)[8] == costs.decode(0, 8).span_s(0, profile.num_layers)
    chunk = costs.chunk(0, 64, 1024, is_last=False).span_s(0, profile.num_layers)
    assert (64, 1024, chunk) in found.prefill
