"""The solvers find what trying every subset, order and cut finds."""

from __future__ import annotations

import itertools
import random

import pytest

from planner.cost import Assignment, CostModel, Objective, PlacedStage, objective_s
from planner.exact import solve_exactly
from planner.problem import whole_pool
from tests.support.planner.random_pools import random_pool, random_profile, random_workload

OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput", "auto")


def every_assignment(costs: CostModel) -> list[Assignment]:
    found: list[Assignment] = []
    devices = range(len(costs.pool.devices))
    for count in range(1, len(devices) + 1):
        for cuts in itertools.combinations(costs.profile.legal_cuts, count - 1):
            spans = list(itertools.pairwise([0, *cuts, costs.profile.num_layers]))
            for order in itertools.permutations(devices, count):
                found.append(tuple(PlacedStage(d, *span) for d, span in zip(order, spans, strict=True)))
    return found


def random_costs(seed: int, most_devices: int, most_layers: int) -> CostModel:
    rng = random.Random(seed)
    profile = random_profile(rng, rng.randint(1, most_layers))
    pool = random_pool(rng, profile, rng.randint(1, most_devices))
    return CostModel(profile, pool, random_workload(rng))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", range(0, 500, 20))
def test_as_good_as_the_best_of_all(objective: Objective, seed: int) -> None:
    for each in range(seed, seed + 20):
        check(random_costs(each, 4, 7), objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", range(10))
def test_as_good_as_the_best_of_all_with_five_devices(objective: Objective, seed: int) -> None:
    check(random_costs(1000 + seed, 5, 10), objective)


def check(costs: CostModel, objective: Objective) -> None:
    best_s = min((objective_s(costs, each, objective) for each in every_assignment(costs)), default=float("inf"))
    solution = solve_exactly(costs, objective, whole_pool(costs))
    if solution is None:
        assert best_s == float("inf")
        return
    assert solution.is_exact
    assert solution.objective_s == pytest.approx(objective_s(costs, solution.assignment, objective), rel=1e-9)
    assert solution.objective_s == pytest.approx(best_s, rel=1e-9)
