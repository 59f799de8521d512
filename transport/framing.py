"""A message as frames on a network: none larger than `FRAME_BYTES`, whatever a message holds.

A heartbeat can only go between two frames, so that a long step is no silence; and a stranger can make a socket keep no
more than one frame before it has proved who it is. On one host messages are not cut.
"""

from __future__ import annotations

from collections.abc import Sequence

from transport.errors import BadMessage

FRAME_BYTES = 2**16
# What CURVE puts around a frame is 33 bytes.
MAX_FRAME_BYTES = FRAME_BYTES + 256
# No msgpack message begins with this byte: the frame says in how many pieces the header follows.
_IN_PIECES = b"\xc1"
_COUNT_BYTES = 4

Frame = bytes | memoryview


def cut(header: bytes, buffers: Sequence[memoryview], frame_bytes: int) -> list[Frame]:
    """A message's frames: its header, then its buffers, in pieces of at most `frame_bytes`."""
    frames: list[Frame] = []
    if len(header) <= frame_bytes:
        frames.append(header)
    else:
        pieces = _pieces(memoryview(header), frame_bytes)
        frames += [_IN_PIECES + len(pieces).to_bytes(_COUNT_BYTES, "big"), *pieces]
    for buffer in buffers:
        if len(buffer) <= frame_bytes:
            frames.append(buffer)
        else:
            frames += _pieces(buffer, frame_bytes)
    return frames


def joined(frames: Sequence[Frame], max_bytes: int) -> list[Frame]:
    """The header, and the one buffer that a message has at most. Raises BadMessage, also for more than `max_bytes`."""
    if len(frames) <= 2 and bytes(frames[0][:1]) != _IN_PIECES:
        return list(frames)
    num_bytes = sum(len(frame) for frame in frames)
    if num_bytes > max_bytes:
        raise BadMessage(f"a message of {num_bytes} bytes; at most {max_bytes} are allowed")
    first = frames[0]
    at = 1
    if bytes(first[:1]) == _IN_PIECES:
        count = int.from_bytes(first[1:], "big")
        if len(first) != 1 + _COUNT_BYTES or not 1 < count < len(frames):
            raise BadMessage("a header in pieces that are not there")
        at = 1 + count
        first = b"".join(frames[1:at])
    rest = frames[at:]
    if len(rest) <= 1:
        return [first, *rest]
    return [first, b"".join(rest)]


def _pieces(data: memoryview, size: int) -> list[memoryview]:
    return [data[at : at + size] for at in range(0, len(data), size)]
