"""The bytes of each token of a fast tokenizer, read from how its decoder puts texts together."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"


def _byte_level_table() -> dict[str, int]:
    """Character → byte of GPT-2's byte-level BPE: printable bytes stand for themselves, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    table = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


_BYTE_LEVEL = _byte_level_table()


def _byte_level_bytes(piece: str) -> bytes:
    values = [_BYTE_LEVEL.get(char) for char in piece]
    # The decoder falls back on a token as a whole: one foreign character and all of it is taken literally.
    return piece.encode() if None in values else bytes(value for value in values if value is not None)


def _sentencepiece_bytes(piece: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE_MARK, " ").encode()


def piece_decoder(decoder_json: str | bytes) -> Callable[[str], bytes] | None:
    """How a token's piece becomes bytes, from the "decoder" part of a tokenizer.json; None where that depends on its
    neighbours (WordPiece and the like)."""
    kinds = {part["type"]: part for part in _decoder_parts(json.loads(decoder_json))}
    if "ByteLevel" in kinds:
        return _byte_level_bytes
    if "Metaspace" in kinds and kinds["Metaspace"].get("replacement", _SPACE_MARK) == _SPACE_MARK:
        return _sentencepiece_bytes
    if "ByteFallback" in kinds and "Replace" in kinds:
        return _sentencepiece_bytes
    return None


def _decoder_parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [part for child in decoder["decoders"] for part in _decoder_parts(child)]
    return [decoder]
