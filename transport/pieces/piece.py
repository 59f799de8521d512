"""What a model's files consist of, for hosts that get them from each other.

A piece lies within one tensor (or is a file's header, or a whole small file): a stage's pieces are its tensors'.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

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
