"""What hosts say about pieces: whatever comes off the wire is either well-formed or refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.errors import BadMessage
from transport.messages.pieces import (
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    MAX_REQUEST_BYTES,
    MAX_SPEED_TEST_BYTES,
    PART_BYTES,
    HaveList,
    HaveRequest,
    PieceMissing,
    PiecePart,
    PieceRefused,
    PieceRequest,
    PieceServerReply,
    PieceServerRequest,
    SpeedTest,
    bitmap_of,
    changed_bits,
    decode_reply,
    decode_request,
    encode,
    has_piece,
)

DIGEST = "0123456789abcdef" * 4
NO_DIGESTS = ("", "abc", DIGEST.upper(), DIGEST[:-1] + "/", "../" * 21 + "a", "/etc/passwd", DIGEST + "\n", DIGEST * 2)

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=80) | st.binary(),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
tagged = st.tuples(
    st.sampled_from(["ask", "holdings", "speed_test", "part", "missing", "held", "refused", "other"]),
    st.integers(-5, 2**63) | st.text(max_size=5),
    st.sampled_from([DIGEST, *NO_DIGESTS]) | st.integers(-1, 2**40) | st.binary(max_size=20),
    st.integers(-1, 2**40),
    st.integers(-1, 2**40),
)


@pytest.mark.parametrize(
    "request_",
    [
        PieceRequest(1, DIGEST, 0, 1),
        PieceRequest(2, DIGEST, MAX_FILE_BYTES, PART_BYTES),
        HaveRequest(3, DIGEST),
        SpeedTest(4, 1),
    ],
)
def test_a_request_comes_out_as_it_went_in(request_: PieceServerRequest) -> None:
    assert decode_request([encode(request_)]) == request_


@pytest.mark.parametrize(
    ("answer", "buffers"),
    [
        (PiecePart(1, DIGEST, 5), [bytes(PART_BYTES)]),
        (PiecePart(1, "", 5), [b""]),
        (PieceMissing(1, DIGEST), []),
        (HaveList(1, bytes(100)), []),
        (PieceRefused("no"), []),
    ],
)
def test_an_answer_comes_out_as_it_went_in(answer: PieceServerReply, buffers: list[bytes]) -> None:
    assert decode_reply([encode(answer), *buffers]) == answer


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [encode(PieceRequest(1, DIGEST, 0, 1)), b""],
        [encode(PieceRequest(-1, DIGEST, 0, 1))],
        [encode(PieceRequest(1, DIGEST, -1, 1))],
        [encode(PieceRequest(1, DIGEST, MAX_FILE_BYTES + 1, 1))],
        [encode(PieceRequest(1, DIGEST, 0, 0))],
        [encode(PieceRequest(1, DIGEST, 0, PART_BYTES + 1))],
        [encode(SpeedTest(1, MAX_SPEED_TEST_BYTES + 1))],
        [encode(SpeedTest(1, 0))],
        [encode(PieceMissing(1, DIGEST))],
        [msgspec.msgpack.encode(["ask", 1, DIGEST, 0, 1, "more"])],
        [b" " * (MAX_REQUEST_BYTES + 1)],
        [b"\x91" * MAX_REQUEST_BYTES],
        *([encode(PieceRequest(1, name, 0, 1))] for name in NO_DIGESTS),
        *([encode(HaveRequest(1, name))] for name in NO_DIGESTS),
    ],
)
def test_what_is_no_request_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(BadMessage):
        decode_request(frames)


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [encode(PiecePart(1, DIGEST, 0))],
        [encode(PiecePart(1, DIGEST, 0)), b"", b""],
        [encode(PiecePart(1, DIGEST, 0)), bytes(PART_BYTES + 1)],
        [encode(PiecePart(1, DIGEST, -1)), b""],
        [encode(PiecePart(1, "../x", 0)), b""],
        [encode(PieceMissing(1, "")), b""],
        [encode(PieceMissing(1, ""))],
        [encode(HaveList(1, b"")), b""],
        [encode(PieceRefused("x" * 1000))],
        [encode(PieceRequest(1, DIGEST, 0, 1))],
        [bytes(MAX_HEADER_BYTES + 1)],
    ],
)
def test_what_is_no_answer_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(BadMessage):
        decode_reply(frames)


@given(st.lists(st.binary(max_size=300) | plain.map(msgspec.msgpack.encode), max_size=3))
def test_no_bytes_do_harm(frames: list[bytes]) -> None:
    for decode in (decode_request, decode_reply):
        with pytest.raises(BadMessage):
            decode(frames)
            raise BadMessage("it was well-formed")


@given(tagged)
def test_what_gets_through_is_within_its_bounds(fields: tuple[Any, ...]) -> None:
    for length in range(1, len(fields) + 1):
        frame = msgspec.msgpack.encode(fields[:length])
        try:
            request = decode_request([frame])
        except BadMessage:
            continue
        if isinstance(request, SpeedTest):
            assert 1 <= request.num_bytes <= MAX_SPEED_TEST_BYTES
        else:
            assert request.digest == DIGEST
        if isinstance(request, PieceRequest):
            assert 0 <= request.offset <= MAX_FILE_BYTES and 1 <= request.num_bytes <= PART_BYTES


@given(st.lists(st.booleans(), max_size=70))
def test_a_bitmap_says_what_is_held_and_nothing_follows_it(held: list[bool]) -> None:
    bitmap = bitmap_of(held)
    assert [has_piece(bitmap, index) for index in range(len(held) + 20)] == held + [False] * 20


@given(st.lists(st.booleans(), max_size=40), st.lists(st.booleans(), max_size=40))
def test_changed_bits_are_those_that_differ(before: list[bool], after: list[bool]) -> None:
    longer = max(len(before), len(after))
    padded = [some + [False] * (longer - len(some)) for some in (before, after)]
    expected = [index for index, (one, other) in enumerate(zip(*padded, strict=True)) if one != other]
    assert list(changed_bits(bitmap_of(before), bitmap_of(after))) == expected
