"""Messages in frames: what is cut comes out whole, and nothing that a hostile peer sends as frames does harm."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.codec import EdgeLimits, Frame, decode_data, encode, join_frames, split_frames
from transport.errors import BadMessage
from transport.messages.ring import DataMessage, Entry, Failed, Fence, Hello, Hidden, Sampled, SequenceId, Tokens

FENCE = Fence("ring", 1, "plan")
LIMITS = EdgeLimits(fence=FENCE, hidden_size=4, dtype="float32", vocab_size=9, context_tokens=99, max_step_tokens=99)
MOST = 2**20
# msgpack never begins with 0xc1, which says that the header is in pieces.
HEADERS = st.binary(min_size=1, max_size=400).filter(lambda header: header[0] != 0xC1)
FRAMES = st.lists(
    st.one_of(st.binary(max_size=40), st.binary(max_size=12).map(lambda rest: b"\xc1" + rest)), min_size=1
)
MESSAGES: list[tuple[DataMessage, bytes | None]] = [
    (Hello(5, FENCE, "a stage"), None),
    (Tokens(FENCE, 1, (), (Entry(SequenceId(1), 0, (1, 2, 3), 1),)), None),
    (Hidden(FENCE, 1, (), (Entry(SequenceId(1), 0, (1,) * 50, 1),), "float32", 50, 4), bytes(range(200)) * 4),
    (Sampled(FENCE, 1, ()), None),
    (Failed(FENCE, 1, (), 0, "a code", "a message"), None),
]


def views(buffer: bytes | None) -> list[memoryview]:
    return [] if buffer is None else [memoryview(buffer)]


@given(HEADERS, st.one_of(st.none(), st.binary(max_size=400)), st.integers(1, 200))
def test_a_message_of_any_size_comes_out_as_it_was(header: bytes, buffer: bytes | None, frame_bytes: int) -> None:
    frames = split_frames(header, views(buffer), frame_bytes)
    assert max(len(frame) for frame in frames) <= max(frame_bytes, 5)
    assert [bytes(frame) for frame in join_frames(frames, MOST)] == [header, *map(bytes, views(buffer))]


@given(HEADERS, st.binary(max_size=400), st.integers(1, 200), st.integers(0, 1000))
def test_more_bytes_than_are_allowed_are_refused(header: bytes, buffer: bytes, frame_bytes: int, most: int) -> None:
    frames = split_frames(header, views(buffer), frame_bytes)
    num_bytes = sum(len(frame) for frame in frames)
    if len(frames) > 2 and num_bytes > most:
        with pytest.raises(BadMessage):
            join_frames(frames, most)
    else:
        assert len(join_frames(frames, max(most, num_bytes))) == 2


@given(FRAMES)
def test_frames_of_any_kind_are_a_message_or_refused(frames: list[bytes]) -> None:
    parts: list[Frame] = [memoryview(frame) for frame in frames]
    try:
        found = join_frames(parts, MOST)
    except BadMessage:
        return
    assert 1 <= len(found) <= 2
    assert sum(len(part) for part in found) <= sum(len(frame) for frame in frames)
    with pytest.raises(BadMessage):  # Noise is no message.
        decode_data(found, LIMITS)


@given(
    st.sampled_from(MESSAGES),
    st.integers(1, 100),
    st.lists(st.tuples(st.sampled_from(["drop", "repeat", "swap", "flip", "cut"]), st.integers(0), st.integers(0))),
)
def test_a_message_that_was_tampered_with_is_refused_or_another_message(
    case: tuple[DataMessage, bytes | None], frame_bytes: int, changes: list[tuple[str, int, int]]
) -> None:
    message, buffer = case
    frames = [bytes(frame) for frame in split_frames(encode(message), views(buffer), frame_bytes)]
    for how, where, what in changes:
        tamper(frames, how, where, what)
    if not frames:
        return
    try:
        received = decode_data(join_frames(frames, MOST), LIMITS)
    except BadMessage:
        assert changes, "nothing was changed"
        return
    if not changes:
        assert received.message == message
        assert [bytes(each) for each in received.buffers] == [bytes(each) for each in views(buffer)]


def tamper(frames: list[bytes], how: str, where: int, what: int) -> None:
    if not frames:
        return
    at = where % len(frames)
    other = what % len(frames)
    if how == "drop":
        del frames[at]
    elif how == "repeat":
        frames.insert(other, frames[at])
    elif how == "swap":
        frames[at], frames[other] = frames[other], frames[at]
    elif frames[at]:
        byte = what % len(frames[at])
        changed = bytes([frames[at][byte] ^ (1 + what % 255)])
        frames[at] = frames[at][:byte] + (changed + frames[at][byte + 1 :] if how == "flip" else b"")


@pytest.mark.parametrize("first", [b"\xc1", b"\xc1\0\0", b"\xc1\0\0\0\0", b"\xc1\0\0\0\1", b"\xc1\xff\xff\xff\xff"])
def test_pieces_that_are_not_there(first: bytes) -> None:
    with pytest.raises(BadMessage):
        join_frames([first, b"a", b"b"], MOST)
