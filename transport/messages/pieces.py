"""Pieces of models, and the messages by which hosts request them from a piece server.

A `PiecePart` is followed by one raw buffer; everything else is one frame. Pieces are asked for by what is in them,
never by a path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar

import msgspec
from msgspec import Struct

from transport.errors import BadMessage

MAX_PIECE_BYTES = 16 * 2**20
MAX_LIST_BYTES = 16 * 2**20
MAX_FILE_BYTES = 1 << 44
LIST_VERSION = 2


class Piece(Struct, frozen=True, array_like=True):
    """`digest` is the SHA-256 of its bytes, 64 hexadecimal digits."""

    digest: str
    num_bytes: int


class PlacedPiece(Struct, frozen=True, array_like=True):
    """Bytes [offset, offset + num_bytes) of a file. `tensor` is the name that its format stores it under; empty for
    what every stage needs: headers and small files."""

    offset: int
    num_bytes: int
    digest: str
    tensor: str = ""


class ListedFile(Struct, frozen=True, kw_only=True):
    """`name` has no folder in it. `whole_sha256` is known for files that a hub names by it; else empty. `reader` is who
    needs it: stages, or the engine alone (the tokenizer)."""

    name: str
    num_bytes: int
    pieces: tuple[PlacedPiece, ...]
    whole_sha256: str = ""
    reader: Literal["stage", "engine"] = "stage"


class PieceList(Struct, frozen=True, kw_only=True):
    """All of a model that its stages and its engine need. Its SHA-256 as JSON is the model's digest. Pieces are counted
    through all files, in order."""

    version: int
    model: str
    format: Literal["gguf", "safetensors"]
    files: tuple[ListedFile, ...]


PART_BYTES = 256 * 2**10
MAX_REQUEST_BYTES = 1024
MAX_HEADER_BYTES = 128 * 2**10
MAX_SPEED_TEST_BYTES = 64 * 2**20
MAX_REASON_CHARACTERS = 200
_MAX_TOKEN = 2**63 - 1
_DIGEST = re.compile(r"[0-9a-f]{64}")
_BITMAP_BYTES = 64 * 2**10

# What CURVE puts around a frame counts too.
_ENVELOPE_BYTES = 1024
MAX_REQUEST_FRAME_BYTES = MAX_REQUEST_BYTES + _ENVELOPE_BYTES
MAX_REPLY_FRAME_BYTES = max(PART_BYTES, MAX_HEADER_BYTES) + _ENVELOPE_BYTES


class PieceRequest(Struct, frozen=True, tag="ask", array_like=True, forbid_unknown_fields=True):
    """Bytes [offset, offset + num_bytes) of the piece, or as many of them as it has. A whole file that a host was asked
    to give (`FindFile`) is one piece."""

    token: int
    digest: str
    offset: int
    num_bytes: int


class HaveRequest(Struct, frozen=True, tag="holdings", array_like=True, forbid_unknown_fields=True):
    """Which pieces of the model with this digest are there? Answered by `HaveList`."""

    token: int
    digest: str


class SpeedTest(Struct, frozen=True, tag="speed_test", array_like=True, forbid_unknown_fields=True):
    """Send so many bytes that mean nothing, as parts without a digest."""

    token: int
    num_bytes: int


class PiecePart(Struct, frozen=True, tag="part", array_like=True, forbid_unknown_fields=True):
    """The buffer that follows is what the piece has from `offset` on: less than was asked for only at its end."""

    token: int
    digest: str
    offset: int


class PieceMissing(Struct, frozen=True, tag="missing", array_like=True, forbid_unknown_fields=True):
    """The piece is not there, or its file has changed."""

    token: int
    digest: str


class HaveList(Struct, frozen=True, tag="held", array_like=True, forbid_unknown_fields=True):
    """Bit i % 8 (1 is the lowest) of byte i // 8 says whether piece i of the model's list is there; none follow the
    last byte. Empty for a model that is not known."""

    token: int
    bitmap: bytes


class PieceRefused(Struct, frozen=True, tag="refused", array_like=True, forbid_unknown_fields=True):
    """Nothing more will come on this connection."""

    reason: str


PieceServerRequest = PieceRequest | HaveRequest | SpeedTest
PieceServerReply = PiecePart | PieceMissing | HaveList | PieceRefused

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(PieceServerRequest)
_replies = msgspec.msgpack.Decoder(PieceServerReply)

_T = TypeVar("_T")


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def encode(message: PieceServerRequest | PieceServerReply) -> bytes:
    return _encoder.encode(message)


def decode_request(frames: Sequence[bytes | memoryview]) -> PieceServerRequest:
    """Raises BadMessage."""
    if len(frames) != 1:
        raise BadMessage(f"a request of {len(frames)} frames")
    request: PieceServerRequest = _decode(_requests, frames[0], MAX_REQUEST_BYTES)
    _check_token(request.token)
    if isinstance(request, SpeedTest):
        if not 1 <= request.num_bytes <= MAX_SPEED_TEST_BYTES:
            raise BadMessage(f"a speed test of {request.num_bytes} bytes; at most {MAX_SPEED_TEST_BYTES} are allowed")
        return request
    _check_digest(request.digest)
    if isinstance(request, PieceRequest):
        if not 0 <= request.offset <= MAX_FILE_BYTES:
            raise BadMessage(f"offset {request.offset}; a file has at most {MAX_FILE_BYTES} bytes")
        if not 1 <= request.num_bytes <= PART_BYTES:
            raise BadMessage(f"{request.num_bytes} bytes asked for at once; at most {PART_BYTES} are allowed")
    return request


def decode_reply(frames: Sequence[bytes | memoryview]) -> PieceServerReply:
    """The answer without a part's buffer, which is `frames[1]`. Raises BadMessage."""
    if not frames:
        raise BadMessage("a message without frames")
    reply: PieceServerReply = _decode(_replies, frames[0], MAX_HEADER_BYTES)
    if len(frames) != (2 if isinstance(reply, PiecePart) else 1):
        raise BadMessage(f"{type(reply).__name__} of {len(frames)} frames")
    if isinstance(reply, PieceRefused):
        if len(reply.reason) > MAX_REASON_CHARACTERS:
            raise BadMessage(f"a reason of {len(reply.reason)} characters")
        return reply
    _check_token(reply.token)
    if isinstance(reply, HaveList):
        if len(reply.bitmap) > _BITMAP_BYTES:
            raise BadMessage(f"a bitmap of {len(reply.bitmap)} bytes; at most {_BITMAP_BYTES} are allowed")
    elif reply.digest or isinstance(reply, PieceMissing):  # a speed test's parts have no digest
        _check_digest(reply.digest)
    if isinstance(reply, PiecePart):
        _check_part(reply, len(frames[1]))
    return reply


def _check_part(part: PiecePart, num_bytes: int) -> None:
    if num_bytes > PART_BYTES:
        raise BadMessage(f"a part of {num_bytes} bytes; at most {PART_BYTES} are allowed")
    if not 0 <= part.offset <= MAX_FILE_BYTES:
        raise BadMessage(f"a part at offset {part.offset}; a file has at most {MAX_FILE_BYTES} bytes")


def bitmap_of(held: Sequence[bool]) -> bytes:
    """As `HaveList` has it."""
    found = bytearray((len(held) + 7) // 8)
    for index, is_held in enumerate(held):
        if is_held:
            found[index >> 3] |= 1 << (index & 7)
    return bytes(found)


def has_piece(bitmap: bytes, index: int) -> bool:
    return index >> 3 < len(bitmap) and bool(bitmap[index >> 3] >> (index & 7) & 1)


def changed_bits(before: bytes, after: bytes) -> Iterator[int]:
    """The numbers of the pieces that only one of the bitmaps tells of."""
    size = max(len(before), len(after))
    for at, (one, other) in enumerate(zip(before.ljust(size, b"\0"), after.ljust(size, b"\0"), strict=True)):
        if one != other:
            yield from (8 * at + bit for bit in range(8) if (one ^ other) >> bit & 1)


def _decode(decoder: msgspec.msgpack.Decoder[_T], frame: bytes | memoryview, limit_bytes: int) -> _T:
    if len(frame) > limit_bytes:
        raise BadMessage(f"a header of {len(frame)} bytes; at most {limit_bytes} are allowed")
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(f"a header that can't be decoded: {error}") from error


def _check_token(token: int) -> None:
    if not 0 <= token <= _MAX_TOKEN:
        raise BadMessage(f"token {token}")


def _check_digest(digest: str) -> None:
    if not is_digest(digest):
        raise BadMessage(f"{digest[:80]!r} is not the name of a piece")
