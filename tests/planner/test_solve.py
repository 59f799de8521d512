"""Plans say what they would do, who is left out and why; what contradicts itself is refused with numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from planner.cost import CostModel, Objective
from planner.explain import with_advice
from planner.heuristic import find_best_ring
from planner.measurements import PoolTimes, estimated_link, estimated_pool
from planner.memory import ModelProfile
from planner.options import STRATEGIES, Strategy, Workload, parse_layers
from planner.problem import device_classes, whole_pool
from planner.relaxation import MAX_EXACT_STATES
from planner.solve import make_plan
from tests.support.planner.pool import device, model
from transport.errors import ConfigError, DoesNotFit

ONE = Workload(concurrency=1)


def pool(*devices: object, profile: ModelProfile | None = None) -> PoolTimes:
    return estimated_pool(profile or model(), devices, "here")  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_every_strategy_covers_the_layers(strategy: Strategy) -> None:
    found = make_plan(model(), pool(device("a"), device("b", gb_per_s=20)), ONE, strategy)
    assert sum(stage.num_layers for stage in found.stages) == 8
    assert found.strategy == strategy and strategy in STRATEGIES


def test_one_chat_leaves_a_slow_device_out_and_says_what_it_would_cost() -> None:
    found = make_plan(model(), pool(device("fast", gb_per_s=100), device("slow", gb_per_s=1)), ONE, "latency")
    assert [stage.device for stage in found.stages] == ["fast"]
    assert [item.name for item in found.left_out] == ["slow"]
    assert "make a token" in found.left_out[0].reason and "ms slower" in found.left_out[0].reason


def test_the_fastest_is_filled_first() -> None:
    devices = pool(device("slow", gb_per_s=5), device("fast", gb_per_s=50, usable_mib=580))
    found = make_plan(model(), devices, ONE, "latency")
    assert {stage.device: stage.num_layers for stage in found.stages}["fast"] == 5


def test_use_all_gives_every_device_a_stage() -> None:
    devices = [device(f"d{number}", gb_per_s=10**number) for number in range(4)]
    for strategy in get_args(Strategy):
        found = make_plan(model(), pool(*devices), ONE, strategy, use_all=True)
        assert {stage.device for stage in found.stages} == {each.name for each in devices}
    assert len(make_plan(model(3), pool(*devices, profile=model(3)), ONE, "auto", use_all=True).stages) == 3


def test_a_host_without_a_way_back_is_left_out_by_name() -> None:
    devices = pool(device("near", gb_per_s=1), device("far", gb_per_s=100, host="there"))
    one_way = replace(
        devices, links=tuple(link for link in devices.links if (link.source, link.target) != ("there", "here"))
    )
    found = make_plan(model(), one_way, ONE, "latency")
    assert [stage.device for stage in found.stages] == ["near"]
    assert "host there back to here" in found.left_out[0].reason
    nowhere = replace(devices, links=())
    with pytest.raises(DoesNotFit, match="far is left out"):
        make_plan(model(), nowhere, ONE, "latency")


def test_a_model_larger_than_the_pool_says_by_how_much() -> None:
    with pytest.raises(DoesNotFit, match="GiB at 4,096 tokens × 1; 2 devices offer") as caught:
        make_plan(model(80), pool(device("a", usable_mib=500), device("b", usable_mib=500), profile=model(80)), ONE)
    assert "add another device" in caught.value.hint


def test_no_devices_do_not_fit() -> None:
    with pytest.raises(DoesNotFit):
        make_plan(model(), pool(), ONE)


@pytest.mark.parametrize(
    "work", [replace(ONE, prompt_tokens=0), replace(ONE, output_tokens=0), replace(ONE, concurrency=0)]
)
def test_impossible_workloads(work: Workload) -> None:
    with pytest.raises(ConfigError):
        make_plan(model(), pool(device("a")), work)


def test_times_of_another_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="measured with 8 layers"):
        make_plan(model(9), pool(device("a")), ONE)


def test_layers_by_hand() -> None:
    devices = pool(device("a"), device("b"))
    found = make_plan(model(), devices, ONE, layers=parse_layers("b=3, a=5"))
    assert [(stage.device, stage.first, stage.last) for stage in found.stages] == [("b", 0, 3), ("a", 3, 8)]
    assert found.strategy == "manual"


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("a=3,c=5", ConfigError, "names c, which is not in the pool"),
        ("a=3,b=4", ConfigError, "places 7 layers; made-up has 8"),
        ("a=3,b=6", ConfigError, "places 9 layers"),
        ("a=3,a=5", ConfigError, "named twice"),
        ("a=0,b=8", ConfigError, "says no number"),
        ("a", ConfigError, "says no number"),
        ("", ConfigError, "says no number"),
        ("a=1,b=7", DoesNotFit, "b: these layers need .* more than the"),
    ],
)
def test_layers_by_hand_that_can_not_be(text: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make_plan(model(), pool(device("a"), device("b", usable_mib=500)), ONE, layers=parse_layers(text))


def test_layers_by_hand_respect_shared_memory_and_state() -> None:
    shared = {"memory_pool": "ram", "total_bytes": device("x", usable_mib=500).free_bytes}
    together = pool(device("a", usable_mib=500, **shared), device("b", usable_mib=500, **shared))
    with pytest.raises(DoesNotFit, match="a and b together"):
        make_plan(model(4), pool_of_four(together), ONE, layers=parse_layers("a=2,b=2"))
    bound = model(legal_cuts=(4,))
    with pytest.raises(ConfigError, match="can't be cut after 3"):
        make_plan(bound, pool(device("a"), device("b")), ONE, layers=parse_layers("a=3,b=5"))


def pool_of_four(times: PoolTimes) -> PoolTimes:
    return estimated_pool(model(4), [each.device for each in times.devices], times.head)


def test_advice_names_memory_that_binds_the_best_single_device_and_one_more() -> None:
    devices = pool(device("a", gb_per_s=50, usable_mib=500), device("b", gb_per_s=10, host="there"))
    found = with_advice(model(), devices, ONE, make_plan(model(), devices, ONE, "latency"))
    assert found.advice is not None and found.advice.best_single is not None and found.advice.one_more is not None
    assert "the memory of a" in found.advice.binding
    assert found.advice.best_single.what == "b"
    assert found.advice.one_more.tokens_per_s > found.prediction.tokens_per_s > found.advice.best_single.tokens_per_s


def test_two_rings_where_hops_are_dear() -> None:
    work = Workload(concurrency=2)
    devices = pool(device("a"), device("b", host="there"))
    slow = tuple(replace(link, hop_s=0.2) for link in devices.links if link.source != link.target)
    links = (*slow, *(estimated_link(host, host) for host in ("here", "there")))
    devices = replace(devices, links=links)
    found = with_advice(model(), devices, work, make_plan(model(), devices, work, "throughput"))
    assert found.advice is not None and found.advice.replicas is not None
    assert " beside " in found.advice.replicas.what


def latency_bound_s(costs: CostModel) -> float:
    """No ring has a lower `latency`: each layer on the device that is fastest for it, memory shared out as if layers
    could be cut anywhere, no hops."""
    devices = range(len(costs.pool.devices))
    layers = np.array([np.diff(costs.decode(device, 1).cumulative_s) for device in devices])
    return float(layers.min(axis=0).sum())


@pytest.mark.parametrize("objective", get_args(Objective))
def test_more_than_twelve_unequal_devices_come_near_the_bound(objective: Objective) -> None:
    profile = model(12)
    devices = [device(f"d{number}", gb_per_s=5 + 3 * number, usable_mib=350 + 10 * number) for number in range(15)]
    costs = CostModel(profile, pool(*devices, profile=profile), Workload(concurrency=2))
    limits = whole_pool(costs)
    assert 2 ** len(device_classes(costs, limits)) > MAX_EXACT_STATES
    found = find_best_ring(costs, objective)
    assert found is not None and not found.is_exact
    if objective == "latency":
        assert latency_bound_s(costs) <= found.objective_s < 1.5 * latency_bound_s(costs)
        # The fastest hold all: then the twelve fastest are all that matters.
        best = find_best_ring(costs, objective, devices=tuple(range(3, 15)))
        assert best is not None and found.objective_s == pytest.approx(best.objective_s)


def test_fifteen_alike_are_searched_exactly() -> None:
    devices = pool(*(device(f"d{number}", usable_mib=350) for number in range(15)))
    assert make_plan(model(), devices, ONE, "latency").is_exact
