"""Rates and percentiles of requests, and shares of stages' time, whose numbers are known."""

from __future__ import annotations

import json
from typing import Any

import pytest

from potluck.measure.http_client import HttpExchange
from potluck.measure.load_run import LoadCell, LoadOutcome, LoadRequest
from potluck.measure.summary import (
    Trial,
    bandwidth_bound_tokens_per_s,
    decode_tokens_per_s,
    percentile,
    row_of,
    spread,
    stage_use_between,
    trial_of,
)
from tests.support.planner.pool import model

PROFILE = model(
    4, layer_params=(100, 100, 100, 100), embed_params=1000, norm_params=10, head_params=90, tied_embeddings=True
)


def stage(first: int, last: int, decode_s: float = 0.0, prefill_s: float = 0.0) -> dict[str, Any]:
    return {
        "device": f"d{first}",
        "first": first,
        "last": last,
        "backend": "torch",
        "dtype": "bfloat16",
        "bandwidth_bytes_per_s": 1000.0,
        "decode_s": decode_s,
        "prefill_s": prefill_s,
        "decode_steps": 4,
        "ratio": 1.0,
    }


def test_one_chat_computes_waits_or_is_on_the_wire() -> None:
    before = [stage(0, 2, 1.0, 1.0), stage(2, 4, 1.0, 1.0)]
    after = [stage(0, 2, 5.0, 2.0), stage(2, 4, 3.0, 2.0)]
    first, second = stage_use_between(before, after, 10.0, concurrency=1)
    assert (first.compute, second.compute) == (0.5, 0.3)
    assert first.wire == second.wire == pytest.approx(0.2)
    for use in (first, second):
        assert use.wire is not None
        assert use.compute + use.wire + use.idle == pytest.approx(1.0)


def test_many_chats_overlap_so_that_the_wire_can_not_be_told_from_idling() -> None:
    (use,) = stage_use_between([stage(0, 4)], [stage(0, 4, 9.0)], 10.0, concurrency=4)
    assert (use.compute, use.wire) == (0.9, None)
    assert use.idle == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arrivals", "tokens", "rate"),
    [
        ([[1.0, 2.0, 3.0]], 5, 2.0),
        ([[1.0]], 1, 0.0),
        ([[0.0, 2.0, 4.0, 6.0], [1.0, 3.0, 5.0, 7.0]], 8, 1.0),
        ([[0.0, 2.0, 4.0, 6.0], [1.0, 3.0, 5.0, 7.0]], 16, 2.0),
        ([[0.0, 1.0], [2.0, 3.0]], 4, 0.0),
        ([[2.0, 2.0], [2.0, 2.0]], 4, 0.0),
    ],
    ids=["one", "one of one token", "overlap", "two a chunk", "in turn", "one frame"],
)
def test_tokens_are_counted_while_all_chats_decode(arrivals: list[list[float]], tokens: int, rate: float) -> None:
    assert decode_tokens_per_s(arrivals, tokens) == rate


def test_the_bound_counts_what_a_token_reads() -> None:
    # 200 parameters are 0.4 s, 200 and the head 0.6 s; the embedding's table is not read.
    stages = [stage(0, 2), stage(2, 4)]
    assert bandwidth_bound_tokens_per_s(PROFILE, stages, 1) == pytest.approx(1.0)
    assert bandwidth_bound_tokens_per_s(PROFILE, stages, 2) == pytest.approx(1 / 0.6)
    assert bandwidth_bound_tokens_per_s(PROFILE, stages, 8) == pytest.approx(4 / 0.6)
    assert bandwidth_bound_tokens_per_s(PROFILE, [stage(0, 4)], 8) == pytest.approx(8.0)


CELL = LoadCell(clients=2)


def request(scheduled_s: float, *arrivals_s: float, started_s: float | None = None, **how: Any) -> LoadRequest:
    """One token an arrival; without any it is unanswered."""
    found = HttpExchange(started_s=scheduled_s if started_s is None else started_s)
    for number, at_s in enumerate(arrivals_s, 1):
        text = "data: " + json.dumps({"choices": [{"delta": {"content": "a"}}]}) + "\n\n"
        if number == len(arrivals_s):
            counts = {"prompt_tokens": 10, "completion_tokens": number, "prompt_tokens_details": {"cached_tokens": 4}}
            text += "data: " + json.dumps({"choices": [], "usage": counts}) + "\n\ndata: [DONE]\n\n"
        found.reader.body += text.encode()
        found.reader.marks.append((len(found.reader.body), at_s))
    if arrivals_s:
        found.reader.status, found.reader.is_done, found.ended_s = 200, True, arrivals_s[-1]
    given = {"tokens": 10, "turn": 0, "is_measured": True, **how}
    return LoadRequest(scheduled_s=scheduled_s, exchange=found, **given)


def refused(status: int) -> LoadRequest:
    found = request(1.0)
    found.exchange.reader.status, found.exchange.reader.is_done = status, True
    return found


def spell(*requests: LoadRequest, begin_s: float = 0.0, end_s: float = 10.0, **more: Any) -> Trial:
    given: dict[str, Any] = {"cut_s": end_s, "cpu_s": 0.001, "statuses": [], "is_interrupted": False, "failure": ""}
    outcome = LoadOutcome(requests=list(requests), begin_s=begin_s, end_s=end_s, **{**given, **more})
    found = trial_of(outcome, CELL)
    assert found is not None
    return found


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, percent) for percent in (50, 95, 99, 100)] == [50.0, 95.0, 99.0, 100.0]
    assert [percentile([3.0, 1.0], percent) for percent in (50, 51)] == [1.0, 3.0]
    assert percentile([7.0], 99) == 7.0
    assert percentile([], 50) is None
    assert spread([]) == {"p50": None, "p95": None, "p99": None, "max": None, "mean": None}


def test_times_count_from_when_a_request_was_due() -> None:
    (seen,) = spell(request(1.0, 6.0, 6.5, started_s=5.0)).requests
    assert (seen.ttft_s, seen.latency_s, seen.late_s) == (5.0, 5.5, 4.0)


def test_a_window_counts_what_came_in_it() -> None:
    found = spell(
        request(-3.0, -1.0, 1.0, 2.0, is_measured=False),  # began in the warm-up
        request(3.0, 4.0, 5.0),
        request(8.0, 9.0, 11.0),  # ended after the window
        cut_s=12.0,
    )
    assert (found.tokens, found.tokens_per_s) == (5, 0.5)
    assert (found.answers, found.requests_per_s) == (2, 0.2)
    assert [each.latency_s for each in found.requests] == [2.0, 3.0]


def test_a_row_counts_every_end_apart() -> None:
    broken = request(1.0, 2.0)
    broken.exchange.error = "the connection broke off"
    row = row_of(
        "here",
        CELL,
        [spell(request(0.0, 1.0, 3.0), refused(429), refused(503), refused(503), broken, request(4.0))],
        None,
    )
    ends = {name: row[name] for name in ("done", "failed", "refused_429", "refused_503", "unfinished")}
    assert ends == {"done": 1, "failed": 1, "refused_429": 1, "refused_503": 2, "unfinished": 1}
    assert row["reasons"]["the connection broke off"] == 1
    # The one that was never answered has waited 6 s at least.
    assert (row["ttft_s"]["p50"], row["ttft_s"]["max"]) == (1.0, 6.0)
    assert row["inter_token_s"]["p99"] == 2.0
    assert (row["cached_tokens"], row["cached_share"], row["prompt_tokens"], row["output_tokens"]) == (4, 0.4, 10, 2)


def test_ratios_are_medians_over_rounds() -> None:
    slow = [spell(request(0.0, *(each / 4 for each in range(1, count)))) for count in (11, 21, 31)]
    fast = [spell(request(0.0, *(each / 8 for each in range(1, count)))) for count in (41, 41, 41)]
    row = row_of("there", CELL, fast, slow)
    assert row["ratio"] == {"tokens_per_s": 2.0, "ttft_p50": 0.5, "inter_token_p50": 0.5}
    assert row["tokens_per_s_min_max"] == (4.0, 4.0)


def test_kinds_of_requests_have_waits_of_their_own() -> None:
    found = spell(request(0.0, 1.0, tokens=8), request(0.0, 5.0, tokens=64), request(0.0, 2.0, tokens=8, turn=1))
    row = row_of("here", CELL, [found], None)
    assert [(part["prompt"], part["requests"], part["ttft_s"]["p50"]) for part in row["by_prompt"]] == [
        (8, 2, 1.0),
        (64, 1, 5.0),
    ]
    assert [part["turn"] for part in row["by_turn"]] == [1, 2]
    assert row_of("here", CELL, [spell(request(0.0, 1.0))], None)["by_prompt"] == []


def test_stages_idle_as_their_head_says() -> None:
    before, after = {"stages": [stage(0, 2), stage(2, 4)]}, {"stages": [stage(0, 2, 3.0, 3.0), stage(2, 4, 2.0)]}
    found = spell(request(0.0, 1.0), statuses=[(0.0, before), (10.0, after)])
    row = row_of("here", CELL, [found], None)
    assert [each["idle"] for each in row["stages"]] == pytest.approx([0.4, 0.8])
    # A ring that was replaced meanwhile says nothing.
    replanned = {"stages": [stage(0, 4, 9.0)]}
    assert spell(request(0.0, 1.0), statuses=[(0.0, before), (10.0, replanned)]).stages == ()


def test_a_window_without_time_is_no_spell() -> None:
    outcome = LoadOutcome(
        requests=[], begin_s=5.0, end_s=5.0, cut_s=2.0, cpu_s=0.0, statuses=[], is_interrupted=True, failure=""
    )
    assert trial_of(outcome, CELL) is None
