"""The header of a safetensors file, checked against the file's size.

Format: https://github.com/huggingface/safetensors#format (8 bytes of length, JSON, then the tensors' bytes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from transport.errors import BadCheckpoint

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100 << 20  # The format's own limit.
MAX_DIMENSIONS = 8
ELEMENT_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedTensor:
    """Bytes [offset, offset + file_bytes) of `path`."""

    name: str
    shape: tuple[int, ...]
    format: str
    path: Path
    offset: int
    file_bytes: int


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_header(path: Path, size: int | None = None) -> tuple[PlacedTensor, ...]:
    """The tensors of one file. `size` is the whole file's, where only its beginning lies at `path`.

    Raises BadCheckpoint for a file whose header and size do not agree.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size if size is None else size
            start = file.read(LENGTH_BYTES)
            return parse_header(path, start + file.read(header_bytes(path, start, size) - LENGTH_BYTES), size)
    except OSError as error:
        raise BadCheckpoint(
            f"can't read {path}: {error.strerror}", hint="put the file back or pull the model again"
        ) from error


def header_bytes(path: Path, start: bytes, size: int) -> int:
    """How long the header of a file of `size` bytes is that begins with `start`, its length's bytes included."""
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) < LENGTH_BYTES or length > min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
        raise _bad(path, f"its header would take {length:,} bytes of a file of {size:,}")
    return LENGTH_BYTES + length


def parse_header(path: Path, start: bytes, size: int) -> tuple[PlacedTensor, ...]:
    """The tensors of a file of `size` bytes at `path` that begins with `start`: its whole header or more. Never touches
    the file. Raises BadCheckpoint."""
    data_start = header_bytes(path, start, size)
    if len(start) < data_start:
        raise _bad(path, f"its header takes {data_start:,} bytes, of which {len(start):,} are there")
    entries = _entries(path, start[LENGTH_BYTES:data_start])
    tensors = [_placed(path, name, raw, data_start, size) for name, raw in entries]
    ordered = sorted((tensor for tensor in tensors if tensor.file_bytes), key=lambda tensor: tensor.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.file_bytes > after.offset:
            raise _bad(path, f"tensors {before.name!r} and {after.name!r} overlap")
    return tuple(tensors)


def _entries(path: Path, header: bytes) -> list[tuple[str, Any]]:
    try:
        entries = msgspec.json.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(path, f"its header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _bad(path, "its header is not a JSON object")
    return [(name, raw) for name, raw in entries.items() if name != "__metadata__"]


def _placed(path: Path, name: str, raw: Any, data_start: int, size: int) -> PlacedTensor:
    try:
        entry = msgspec.convert(raw, _Entry)
    except msgspec.ValidationError as error:
        raise _bad(path, f"tensor {name!r} is described wrongly ({error})") from error
    if entry.dtype not in ELEMENT_BYTES:
        raise _bad(path, f"tensor {name!r} has the unknown dtype {entry.dtype!r}")
    if len(entry.shape) > MAX_DIMENSIONS or any(side < 0 for side in entry.shape):
        raise _bad(path, f"tensor {name!r} has the shape {entry.shape}")
    begin, end = entry.data_offsets
    if begin < 0 or end < begin:
        raise _bad(path, f"tensor {name!r} lies at bytes {begin} to {end}")
    expected = math.prod(entry.shape) * ELEMENT_BYTES[entry.dtype]
    if end - begin != expected:
        raise _bad(path, f"tensor {name!r} has {end - begin:,} bytes where its shape needs {expected:,}")
    if data_start + end > size:
        raise _bad(path, f"tensor {name!r} ends at byte {data_start + end:,}, but the file has {size:,} bytes")
    return PlacedTensor(
        name=name, shape=entry.shape, format=entry.dtype, path=path, offset=data_start + begin, file_bytes=expected
    )


def _bad(path: Path, why: str) -> BadCheckpoint:
    return BadCheckpoint(
        f"{path} is truncated or not a safetensors file: {why}", hint="download it again, or delete it and pull"
    )
