"""Everything that is sent comes back equal; whatever is not of the plan is refused, never raised as anything else."""

from __future__ import annotations

import contextlib
import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.codec import EdgeLimits, decode_control, decode_data, encode
from transport.errors import BadMessage
from transport.messages.control import DecodeBucket, Loaded, Loading, Register, Stats
from transport.messages.ring import (
    Entry,
    EntryResult,
    Failed,
    Fence,
    Fork,
    Hidden,
    Op,
    Open,
    Release,
    Sampled,
    SampledToken,
    Sampling,
    SequenceId,
    Tokens,
    Truncate,
)

FENCE = Fence("ring", 1, "plan")
LIMITS = EdgeLimits(fence=FENCE, hidden_size=4, dtype="float32", vocab_size=100, context_tokens=64, max_step_tokens=32)
ONE, TWO = SequenceId(1), SequenceId(2)

ids = st.lists(st.integers(0, 99), min_size=1, max_size=16).map(tuple)
samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 2),
    top_p=st.floats(0.01, 1),
    seed=st.integers(-(2**63), 2**63 - 1),
    logit_bias=st.dictionaries(st.integers(0, 99), st.floats(-100, 100), max_size=3),
    top_logprobs=st.none() | st.integers(0, 20),
)
ops = st.lists(
    st.builds(Open, st.just(ONE), ids, samplings)
    | st.builds(Truncate, st.just(ONE), st.integers(0, 64))
    | st.builds(Fork, st.just(ONE), st.just(TWO), st.integers(1, 64), st.booleans())
    | st.builds(Release, st.just(ONE)),
    max_size=3,
).map(tuple)
entries = st.lists(st.builds(Entry, st.just(ONE), st.integers(0, 40), ids, st.just(1)), max_size=2).map(tuple)


@given(ops, entries)
def test_steps_round_trip(ops: tuple[Op, ...], entries: tuple[Entry, ...]) -> None:
    message = Tokens(FENCE, 7, ops, entries)
    assert decode_data([encode(message)], LIMITS).message == message


def test_results_and_failures_round_trip() -> None:
    token = SampledToken(5, -0.5, ((5, -0.5), (6, -1.5)))
    for message in (
        Sampled(FENCE, 7, (EntryResult(ONE, 3, (token,)),)),
        Sampled(FENCE, 7, (EntryResult(ONE, 3, (token,)),), (0.0, 1e-3, 5.0)),
        Failed(FENCE, 7, (Release(ONE),), 2, "stage_failed", "no", "try"),
    ):
        assert decode_data([encode(message)], LIMITS).message == message


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(frame: bytes) -> None:
    for decode in (lambda: decode_data([frame], LIMITS), lambda: decode_control(frame)):
        with contextlib.suppress(BadMessage):
            decode()


entry = Entry(ONE, 0, (1, 2), 1)
good = Hidden(FENCE, 1, (), (entry,), "float32", 2, 4)


@pytest.mark.parametrize(
    ("message", "buffers"),
    [
        (Tokens(FENCE, 1, (), (Entry(ONE, 0, (), 0),)), []),
        (Tokens(FENCE, 1, (), (Entry(ONE, -1, (1,), 0),)), []),
        (Tokens(FENCE, 1, (), (Entry(ONE, 63, (1, 2), 0),)), []),
        (Tokens(FENCE, 1, (), (Entry(ONE, 0, (1, 100), 0),)), []),
        (Tokens(FENCE, 1, (), (Entry(ONE, 0, (-1,), 0),)), []),
        (Tokens(FENCE, 1, (), (Entry(ONE, 0, (1,), 2),)), []),
        (Tokens(FENCE, 1, (), (Entry(ONE, 0, (1,) * 33, 1),)), []),
        (Tokens(FENCE, 1, (), (entry,)), [bytes(8)]),
        (Tokens(FENCE, 1, (Truncate(ONE, -1),), ()), []),
        (Tokens(FENCE, 1, (Fork(ONE, TWO, 0),), ()), []),
        (Tokens(FENCE, 1, (Fork(ONE, TWO, -1),), ()), []),
        (Tokens(FENCE, 1, (Fork(ONE, TWO, 65),), ()), []),
        (Tokens(FENCE, 1, (Fork(ONE, ONE, 1),), ()), []),
        (Tokens(FENCE, 1, (Fork(ONE, SequenceId(-1), 1),), ()), []),
        (Tokens(FENCE, 1, (Fork(SequenceId(-1), ONE, 1),), ()), []),
        (Tokens(FENCE, 1, (Open(ONE, (1,) * 65, Sampling()),), ()), []),
        (Tokens(FENCE, 1, (Open(ONE, (100,), Sampling()),), ()), []),
        (Tokens(FENCE, 1, (Open(ONE, (1,), Sampling(temperature=float("nan"))),), ()), []),
        (Tokens(FENCE, 1, (Open(ONE, (1,), Sampling(repetition_penalty=0.0)),), ()), []),
        (Tokens(FENCE, 1, (Open(ONE, (1,), Sampling(logit_bias={100: 1.0})),), ()), []),
        (good, []),
        (good, [bytes(31)]),
        (good, [bytes(33)]),
        (good, [bytes(32), bytes(1)]),
        (Hidden(FENCE, 1, (), (entry,), "float32", 3, 4), [bytes(48)]),
        (Hidden(FENCE, 1, (), (entry,), "float32", 2, 5), [bytes(40)]),
        (Hidden(FENCE, 1, (), (entry,), "bfloat16", 2, 4), [bytes(16)]),
        (Sampled(FENCE, 1, (EntryResult(ONE, 0, (SampledToken(100),)),)), []),
        (Hidden(FENCE, 1, (), (entry,), "float32", 2, 4, (-1e-9,)), [bytes(32)]),
        (Hidden(FENCE, 1, (), (entry,), "float32", 2, 4, (float("nan"),)), [bytes(32)]),
        (Sampled(FENCE, 1, (), (0.5, float("nan"))), []),
        (Sampled(FENCE, 1, (), (float("inf"),)), []),
        (Sampled(FENCE, 1, (), (-1.0,)), []),
        (Sampled(FENCE, 1, (), (0.0,) * 1025), []),
    ],
)
def test_what_the_plan_does_not_allow_is_refused(message: Tokens | Hidden | Sampled, buffers: list[bytes]) -> None:
    with pytest.raises(BadMessage):
        decode_data([encode(message), *buffers], LIMITS)


def test_what_the_plan_allows_is_not() -> None:
    assert decode_data([encode(good), bytes(32)], LIMITS).message == good


def test_huge_headers_are_refused_before_decoding() -> None:
    with pytest.raises(BadMessage, match="at most"):
        decode_data([bytes(20 * 2**20)], LIMITS)


def test_limits_of_a_message_follow_from_the_plan() -> None:
    wide = dataclasses.replace(LIMITS, hidden_size=8192, max_step_tokens=2048)
    assert wide.max_message_bytes == 8192 * 2048 * 4


def test_register_round_trips() -> None:
    register = Register(
        version=1,
        device="torch-0",
        backend="torch",
        kind="cpu",
        host="here",
        pid=1,
        threads=1,
        free_bytes=2**40,
        total_bytes=2**40,
        memory_pool="ram",
        bandwidth_bytes_per_s=1e10,
        compute_dtype="bfloat16",
    )
    assert decode_control(encode(register)) == register


@pytest.mark.parametrize("lie", [float("nan"), float("inf"), -0.5, 1e30])
def test_control_carries_no_numbers_that_nothing_can_be_planned_with(lie: float) -> None:
    """They come from other hosts, and would end the head where they meet its arithmetic."""
    bucket = DecodeBucket(largest_rows=1, steps=1, rows=1, context_tokens=1, seconds=0.5)
    honest = Stats(token=1, rss_bytes=1, decode_s=0.5, decode_buckets=(bucket,))
    assert decode_control(encode(honest)) == honest
    deep = msgspec.structs.replace(honest, decode_buckets=(msgspec.structs.replace(bucket, seconds=lie),))
    for message in (msgspec.structs.replace(honest, decode_s=lie), deep):
        with pytest.raises(BadMessage, match="impossible numbers"):
            decode_control(encode(message))


def test_control_carries_no_counts_below_zero() -> None:
    with pytest.raises(BadMessage):
        decode_control(encode(Loading(FENCE, -1, 5)))
    with pytest.raises(BadMessage):
        decode_control(encode(Loaded(FENCE, 1, 1, 0.5, fetched={"den": -1})))
