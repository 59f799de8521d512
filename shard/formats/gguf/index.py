"""The index that an ingested GGUF is opened from says where each tensor is, under its Hugging Face name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from transport.errors import BadCheckpoint

INDEX_FILE = "index.json"
INDEX_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedTensor:
    """Bytes [offset, offset + file_bytes) of the file, and what has to be undone to get Hugging Face's numbers.

    `rotary_heads`: the rows are those of this many heads, each with its rotary pairs interleaved (Llama's Q and K).
    `plus_one`: the file holds w + 1 (Gemma's norms).
    """

    name: str
    shape: tuple[int, ...]
    format: str
    offset: int
    file_bytes: int
    rotary_heads: int | None
    plus_one: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufIndex:
    """`file` is relative to the index's folder or absolute; size and time tell whether it is still the same file."""

    version: int
    file: str
    size_bytes: int
    mtime_ns: int
    tensors: tuple[IndexedTensor, ...]


def read_index(folder: Path) -> GgufIndex:
    path = folder / INDEX_FILE
    try:
        index = msgspec.json.decode(path.read_bytes(), type=GgufIndex)
    except (OSError, msgspec.MsgspecError) as error:
        raise BadCheckpoint(f"the index {path} can't be read: {error}", hint="pull the model again") from error
    if index.version != INDEX_VERSION:
        raise BadCheckpoint(f"the index {path} is of another version of potluck", hint="pull the model again")
    return index


def write_index(folder: Path, index: GgufIndex) -> None:
    (folder / INDEX_FILE).write_bytes(msgspec.json.encode(index))
