"""Errors are of what was predicted, medians are over visits and then plans, and every plan can be asked for."""

from __future__ import annotations

import pytest

from bench.planner.prediction import PlanTrial, plan_choices, summary
from planner.options import parse_layers


def visit(plan: str, number: int, cut: int, predicted: tuple[float, float], measured: tuple[float, float]) -> PlanTrial:
    return PlanTrial(
        plan=plan,
        round=number,
        started=0.0,
        stages=[["a", 0, cut], ["b", cut, 8]],
        predicted={
            "tokens_per_s": predicted[0],
            "tokens_per_s_many": predicted[1],
            "workload_tokens_per_s": predicted[1] / 2,
        },
        measured=[{"decode_tokens_per_s": rate, "tokens_per_s": rate / 2} for rate in measured],
    )


def test_errors_and_recommendations() -> None:
    visits = [
        visit("latency", 0, 6, (11.0, 20.0), (10.0, 16.0)),
        visit("latency", 1, 6, (13.0, 20.0), (10.0, 16.0)),
        visit("even", 0, 4, (8.0, 30.0), (10.0, 30.0)),
        visit("throughput", 0, 4, (8.0, 30.0), (10.0, 24.0)),
        PlanTrial(plan="by hand", round=0, started=0.0, failed="does not fit"),
    ]
    found = summary(visits)
    assert [plan["asked"] for plan in found["plans"]] == [["latency"], ["even", "throughput"]]
    assert [plan["error_one"] for plan in found["plans"]] == pytest.approx([0.2, -0.2])
    assert found["plans"][1]["measured_many"] == 27.0
    medians = found["medians"]
    assert medians["plans"] == 2
    assert medians["abs_error_one"] == pytest.approx(0.2)
    assert medians["latency_of_best"] == pytest.approx(1.0)
    assert medians["throughput_of_best"] == pytest.approx(24.0 / 27.0)
    assert medians["throughput_of_best_decoding"] == pytest.approx(24.0 / 27.0)
    assert medians["abs_error_with_prompts"] == medians["abs_error_many"]
    assert len(found["visits"]) == 5


def test_a_recommendation_that_is_not_the_best_is_told_so() -> None:
    visits = [
        visit("throughput", 0, 6, (11.0, 20.0), (10.0, 18.0)),
        visit("even", 0, 4, (8.0, 30.0), (8.0, 20.0)),
        visit("latency", 0, 4, (8.0, 30.0), (8.0, 20.0)),
    ]
    medians = summary(visits)["medians"]
    assert medians["throughput_of_best"] == pytest.approx(0.9)
    assert medians["latency_of_best"] == pytest.approx(0.8)


def test_nothing_worked() -> None:
    assert summary([PlanTrial(plan="x", round=0, started=0.0, failed="no")])["medians"] == {"plans": 0}


@pytest.mark.parametrize("num_layers", [16, 30])
def test_splits_by_hand_place_every_layer(num_layers: int) -> None:
    choices = plan_choices(["cpu", "mid/cpu", "slow/cpu"], num_layers)
    by_hand = [choice.options[1] for choice in choices if choice.options[0] == "--layers"]
    assert len(by_hand) >= 4
    for text in by_hand:
        assert sum(count for _, count in parse_layers(text)) == num_layers
