"""Shares of a stage's time add up, and the bound is that of reading weights."""

from __future__ import annotations

from typing import Any

import pytest

from potluck.measure.summary import bandwidth_bound_tokens_per_s, stage_use_between
from tests.planner.pool import model

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


def test_the_bound_counts_what_a_token_reads() -> None:
    # 200 parameters are 0.4 s, 200 and the head 0.6 s; the embedding's table is not read.
    stages = [stage(0, 2), stage(2, 4)]
    assert bandwidth_bound_tokens_per_s(PROFILE, stages, 1) == pytest.approx(1.0)
    assert bandwidth_bound_tokens_per_s(PROFILE, stages, 2) == pytest.approx(1 / 0.6)
    assert bandwidth_bound_tokens_per_s(PROFILE, stages, 8) == pytest.approx(4 / 0.6)
    assert bandwidth_bound_tokens_per_s(PROFILE, [stage(0, 4)], 8) == pytest.approx(8.0)
