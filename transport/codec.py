"""The codec turns messages into frames of bounded size and checks every frame that comes before it is used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from transport.errors import BadMessage
from transport.messages.control import ControlMessage
from transport.messages.ring import (
    DTYPE_BYTES,
    DataMessage,
    DType,
    Entry,
    Failed,
    Fence,
    Fork,
    Hidden,
    Op,
    Open,
    Release,
    Sampled,
    Sampling,
    Tokens,
)

FRAME_BYTES = 2**16
"""On a network no frame is larger, whatever a message holds. A heartbeat can only go between two frames, so that a long
step is no silence; and a stranger can make a socket keep no more than one frame before it has proved who it is."""

# What CURVE puts around a frame is 33 bytes.
MAX_FRAME_BYTES = FRAME_BYTES + 256
# No msgpack message begins with this byte: the frame says in how many pieces the header follows.
_SPLIT_MARK = b"\xc1"
_COUNT_BYTES = 4

Frame = bytes | memoryview


def split_frames(header: bytes, buffers: Sequence[memoryview], frame_bytes: int) -> list[Frame]:
    """A message's frames: its header, then its buffers, in pieces of at most `frame_bytes`."""
    frames: list[Frame] = []
    if len(header) <= frame_bytes:
        frames.append(header)
    else:
        slices = _slices(memoryview(header), frame_bytes)
        frames += [_SPLIT_MARK + len(slices).to_bytes(_COUNT_BYTES, "big"), *slices]
    for buffer in buffers:
        if len(buffer) <= frame_bytes:
            frames.append(buffer)
        else:
            frames += _slices(buffer, frame_bytes)
    return frames


def join_frames(frames: Sequence[Frame], max_bytes: int) -> list[Frame]:
    """The header, and the one buffer that a message has at most. Raises BadMessage, also for more than `max_bytes`."""
    if len(frames) <= 2 and bytes(frames[0][:1]) != _SPLIT_MARK:
        return list(frames)
    num_bytes = sum(len(frame) for frame in frames)
    if num_bytes > max_bytes:
        raise BadMessage(f"a message of {num_bytes} bytes; at most {max_bytes} are allowed")
    first = frames[0]
    at = 1
    if bytes(first[:1]) == _SPLIT_MARK:
        count = int.from_bytes(first[1:], "big")
        if len(first) != 1 + _COUNT_BYTES or not 1 < count < len(frames):
            raise BadMessage("a header in pieces that are not there")
        at = 1 + count
        first = b"".join(frames[1:at])
    rest = frames[at:]
    if len(rest) <= 1:
        return [first, *rest]
    return [first, b"".join(rest)]


def _slices(data: memoryview, size: int) -> list[memoryview]:
    return [data[at : at + size] for at in range(0, len(data), size)]


MAX_HEADER_BYTES = 16 * 2**20
MAX_CONTROL_BYTES = 2**20
MAX_STAGES = 1024
_LARGEST_NUMBER = 2**63

_encoder = msgspec.msgpack.Encoder()
_data_decoder = msgspec.msgpack.Decoder(DataMessage)
_control_decoder = msgspec.msgpack.Decoder(ControlMessage)

_T = TypeVar("_T")


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """A checked message and the buffers behind it. A buffer is read-only and may share memory with the frame.

    A Struct, as messages are: a frozen dataclass takes a tenth of a hop to make.
    """

    message: DataMessage
    buffers: tuple[memoryview, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeLimits:
    """What an edge of one plan may carry. A message outside of it is refused before a byte is used.

    `dtype` and `hidden_size` are those of hidden states on this edge; token ids lie in [0, vocab_size).
    """

    fence: Fence
    hidden_size: int
    dtype: DType
    vocab_size: int
    context_tokens: int
    max_step_tokens: int

    @property
    def max_message_bytes(self) -> int:
        """The largest frame that can be honest: for ZeroMQ's MAXMSGSIZE."""
        return max(MAX_HEADER_BYTES, self.max_step_tokens * self.hidden_size * DTYPE_BYTES[self.dtype])


def encode(message: DataMessage | ControlMessage) -> bytes:
    return _encoder.encode(message)


def decode_control(frame: bytes | memoryview) -> ControlMessage:
    """Raises BadMessage, also for numbers below zero or without bounds: nothing can be counted or planned with them."""
    message: ControlMessage = _decode(_control_decoder, frame, MAX_CONTROL_BYTES)
    if not _has_valid_numbers(message):
        raise BadMessage(f"{type(message).__name__} with impossible numbers")
    return message


def decode_data(frames: Sequence[bytes | memoryview], limits: EdgeLimits) -> Received:
    """Raises BadMessage for anything that is not a well-formed message of this edge, buffers included.

    A message with another fence comes out undisturbed: the receiver drops it.
    """
    if not frames:
        raise BadMessage("a message without frames")
    message = _decode(_data_decoder, frames[0], MAX_HEADER_BYTES)
    buffers = tuple([memoryview(frame) for frame in frames[1:]])
    if message.fence == limits.fence:
        check_data(message, buffers, limits)
    return Received(message=message, buffers=buffers)


def check_data(message: DataMessage, buffers: Sequence[memoryview], limits: EdgeLimits) -> None:
    """Raises BadMessage if `message` can't belong to this edge."""
    expected_buffers = 1 if isinstance(message, Hidden) else 0
    if len(buffers) != expected_buffers:
        raise BadMessage(f"{type(message).__name__} with {len(buffers)} buffers, not {expected_buffers}")
    if isinstance(message, Hidden):
        if message.ops:
            _check_ops(message.ops, limits)
        _check_hidden(message, _check_entries(message.entries, limits), buffers[0], limits)
        _check_seconds(message.seconds)
    elif isinstance(message, Sampled):
        for result in message.results:
            for token in result.tokens:
                if not 0 <= token.token_id < limits.vocab_size:
                    raise BadMessage(f"token id {token.token_id} outside of the vocabulary of {limits.vocab_size}")
        _check_seconds(message.seconds)
    elif isinstance(message, Tokens):
        _check_ops(message.ops, limits)
        _check_entries(message.entries, limits)
    elif isinstance(message, Failed):
        _check_ops(message.ops, limits)


def _decode(decoder: msgspec.msgpack.Decoder[_T], frame: bytes | memoryview, limit_bytes: int) -> _T:
    if len(frame) > limit_bytes:
        raise BadMessage(f"a header of {len(frame)} bytes; at most {limit_bytes} are allowed")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(f"a header that can't be decoded: {error}") from error


def _has_valid_numbers(value: object) -> bool:
    """Whether all numbers in it are numbers of something."""
    match value:
        case bool() | str() | bytes() | None:
            return True
        case int() | float():
            return 0 <= value <= _LARGEST_NUMBER
        case tuple() | list():
            return all(map(_has_valid_numbers, value))
        case dict():
            return all(map(_has_valid_numbers, value.values()))
        case msgspec.Struct():
            return all(_has_valid_numbers(getattr(value, name)) for name in value.__struct_fields__)
    return False


def _check_ids(ids: tuple[int, ...], limits: EdgeLimits) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < limits.vocab_size):
        raise BadMessage(f"token ids outside of the vocabulary of {limits.vocab_size}")


def _check_ops(ops: tuple[Op, ...], limits: EdgeLimits) -> None:
    for op in ops:
        match op:
            case Open(prompt_ids=prompt_ids, sampling=sampling):
                if len(prompt_ids) > limits.context_tokens:
                    raise BadMessage(f"a prompt of {len(prompt_ids)} tokens; the context is {limits.context_tokens}")
                _check_ids(prompt_ids, limits)
                _check_sampling(sampling, limits)
            case Fork():
                _check_fork(op, limits)
            case Release():
                pass
            case _:
                if op.length < 0:
                    raise BadMessage(f"truncate to {op.length} tokens")


def _check_fork(fork: Fork, limits: EdgeLimits) -> None:
    if fork.sequence < 0 or fork.source < 0 or fork.sequence == fork.source:
        raise BadMessage(f"a fork of sequence {fork.source} to {fork.sequence}")
    if not 1 <= fork.length <= limits.context_tokens:
        raise BadMessage(f"a fork of {fork.length} tokens; the context is {limits.context_tokens}")


def _check_sampling(sampling: Sampling, limits: EdgeLimits) -> None:
    numbers = (
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        *sampling.logit_bias.values(),
    )
    if not all(math.isfinite(number) for number in numbers):
        raise BadMessage("a sampling parameter that is not a finite number")
    if sampling.temperature < 0 or sampling.top_k < 0 or sampling.repetition_penalty <= 0:
        raise BadMessage("a sampling parameter out of range")
    if (sampling.top_logprobs or 0) < 0 or (sampling.top_logprobs or 0) > limits.vocab_size:
        raise BadMessage(f"top_logprobs of {sampling.top_logprobs}")
    _check_ids(tuple(sampling.logit_bias), limits)


def _check_entries(entries: tuple[Entry, ...], limits: EdgeLimits) -> int:
    """The tokens in them. Called for every step: plain loops and few calls, since caches are cold."""
    num_tokens = 0
    for entry in entries:
        ids = entry.token_ids
        count = len(ids)
        num_tokens += count
        if count == 0 or entry.start < 0 or entry.start + count > limits.context_tokens:
            raise BadMessage(
                f"an entry at positions [{entry.start}, {entry.start + count}); the context is {limits.context_tokens}"
            )
        if not 0 <= entry.num_logits <= count:
            raise BadMessage(f"num_logits {entry.num_logits} of {count} tokens")
        if count > 1 or not 0 <= ids[0] < limits.vocab_size:
            _check_ids(ids, limits)
    if num_tokens > limits.max_step_tokens:
        raise BadMessage(f"a step of {num_tokens} tokens; at most {limits.max_step_tokens} are allowed")
    return num_tokens


def _check_hidden(message: Hidden, num_tokens: int, buffer: memoryview, limits: EdgeLimits) -> None:
    # A step of ops alone has no hidden states, and its sender may not know how wide they would be.
    is_as_wide = message.hidden_size == limits.hidden_size or not num_tokens
    if message.num_tokens != num_tokens or not is_as_wide or message.dtype != limits.dtype:
        raise BadMessage(
            f"hidden states [{message.num_tokens}, {message.hidden_size}] {message.dtype}; "
            f"the plan says [{num_tokens}, {limits.hidden_size}] {limits.dtype}"
        )
    expected = num_tokens * limits.hidden_size * DTYPE_BYTES[limits.dtype]
    if buffer.nbytes != expected:
        raise BadMessage(f"a buffer of {buffer.nbytes} bytes; the header announces {expected}")


def _check_seconds(seconds: tuple[float, ...]) -> None:
    if len(seconds) > MAX_STAGES:
        raise BadMessage(f"the seconds of {len(seconds)} stages; a ring has at most {MAX_STAGES}")
    for each in seconds:
        if not 0.0 <= each < math.inf:
            raise BadMessage(f"a stage that computed for {each} seconds")
