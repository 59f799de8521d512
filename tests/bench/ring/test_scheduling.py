"""Bounds are what rings can reach, prompts never begin alike, and labs differ by what they say."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from bench.lab import load_spec
from bench.ring.scheduling import by_hand
from bench.ring.sections import Prompts
from bench.targets import (
    LAB_TARGETS,
    SCHEDULING_TARGETS,
    bound_tokens_per_s,
    busiest,
    filled_ring,
    gaps_between,
    judge_targets,
    medians,
)
from tests.support.engine.fakes import VOCAB, ByteTokenizer
from transport.messages.control import DecodeBucket, Stats

LABS = Path(__file__).parents[3] / "bench" / "lab" / "specs"


def test_one_group_visits_everything_and_many_wait_for_the_slowest_stage() -> None:
    assert bound_tokens_per_s(1, 4, [0.010, 0.020], 0.010) == pytest.approx(4 / 0.040)
    assert bound_tokens_per_s(4, 1, [0.010, 0.020], 0.010) == pytest.approx(1 / 0.020)
    # Two groups: 2 · 20 ms are just what one takes to come round.
    assert bound_tokens_per_s(2, 1, [0.010, 0.020], 0.010) == pytest.approx(2 / 0.040)


def test_a_ring_is_filled_by_as_many_groups_as_fit_into_a_round() -> None:
    assert filled_ring([0.010, 0.010], 0.0) == 2
    assert filled_ring([0.010, 0.010], 0.001) == 3
    assert filled_ring([0.005, 0.020], 0.0) == 2
    assert filled_ring([0.005, 0.005], 0.030) == 8


def test_the_busiest_steps_between_two_looks() -> None:
    before = Stats(token=1, rss_bytes=0, decode_buckets=(_bucket(1, 10, 10, 5.0), _bucket(4, 2, 7, 0.1)))
    after = Stats(
        token=2, rss_bytes=0, decode_buckets=(_bucket(1, 11, 11, 5.1), _bucket(2, 3, 6, 0.3), _bucket(4, 12, 46, 1.1))
    )
    found = busiest(before, after)
    assert (found.rows, found.seconds) == (pytest.approx(3.9), pytest.approx(0.1))
    with pytest.raises(ValueError, match="no decode step"):
        busiest(after, after)


def test_gaps_belong_to_the_span_in_which_they_end() -> None:
    assert gaps_between([1.0, 2.0, 4.0, 5.0], 2.0, 4.0) == [2.0]


def test_a_section_that_failed_in_one_round_counts_in_the_others() -> None:
    found = [{"1 streams": 10.0, "2 streams": 18.0}, {"1 streams": 10.0}, {"1 streams": 20.0, "2 streams": 40.0}]
    assert medians(found) == {"1 streams": 10.0, "2 streams": 29.0}
    (told,) = [row for row in judge_targets(found, SCHEDULING_TARGETS) if row["what"] == "2 streams over one"]
    assert told["median"] == 1.9 and told["met"]


def test_every_target_has_a_name_of_its_own() -> None:
    for targets in (SCHEDULING_TARGETS, LAB_TARGETS):
        assert len({target.name for target in targets}) == len(targets)


def test_prompts_have_their_length_and_share_no_beginning() -> None:
    prompts = Prompts(ByteTokenizer(), VOCAB)
    texts = [*prompts.texts(10, 200), *prompts.texts(10, 200)]
    assert all(190 < len(text) <= 200 for text in texts)
    assert all(_common(one, other) < 24 for one, other in combinations(texts, 2))
    ids = prompts.ids(500)
    assert len(ids) == 500 and not set(ids) & ByteTokenizer.eos_ids and max(ids) < VOCAB
    assert ids != prompts.ids(500)
    assert Prompts(ByteTokenizer(), VOCAB).texts(20, 200) == texts


def test_layers_by_hand_are_of_workers_in_order() -> None:
    assert by_hand([18, 12]) == "cpu-1=18,cpu-2=12"
    assert by_hand([30]) == "cpu=30"
    assert by_hand([]) is None


def test_the_labs_differ_by_the_delay_of_every_hop_alone() -> None:
    near, far = (load_spec(LABS / name) for name in ("two-stages.toml", "two-stages-delay.toml"))
    assert near.hosts == far.hosts and not near.links
    hosts = [host.name for host in far.hosts]
    assert {(link.source, link.target, link.delay_s) for link in far.links} == {
        (source, target, 0.010) for source in hosts for target in hosts if source != target
    }
    assert [host.cpu for host in near.hosts] == [None, *[0.5] * (len(near.hosts) - 1)]


def _bucket(largest: int, steps: int, rows: int, seconds: float) -> DecodeBucket:
    return DecodeBucket(largest_rows=largest, steps=steps, rows=rows, context_tokens=0, seconds=seconds)


def _common(one: str, other: str) -> int:
    return next(at for at, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
