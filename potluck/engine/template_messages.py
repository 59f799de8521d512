"""What the engine and its template process say to each other: frames of msgpack, each after its length."""

from __future__ import annotations

from typing import IO, Literal

from msgspec import Raw, Struct

_LENGTH_BYTES = 4
MAX_FRAME_BYTES = 128 * 2**20

Failure = Literal["", "refused", "too large"]


class Read(Struct, frozen=True, tag=True):
    """The template to render from now on. Answered once."""

    source: str
    within_s: float


class Render(Struct, frozen=True, tag=True):
    """`variables` are a dict by name; `within_s` is of computing."""

    variables: Raw
    within_s: float


class Answer(Struct, frozen=True):
    """`text` is what was rendered, or of what was read its literals; where there is a `failure`, what went wrong."""

    text: str
    failure: Failure = ""


def write_frame(stream: IO[bytes], frame: bytes) -> None:
    stream.write(len(frame).to_bytes(_LENGTH_BYTES, "big") + frame)
    stream.flush()


def read_frame(stream: IO[bytes]) -> bytes | None:
    """None at the end of the stream, also in the middle of a frame, and for a frame that is too long."""
    length = int.from_bytes(head, "big") if len(head := stream.read(_LENGTH_BYTES)) == _LENGTH_BYTES else None
    if length is None or length > MAX_FRAME_BYTES:
        return None
    frame = stream.read(length)
    return frame if len(frame) == length else None
