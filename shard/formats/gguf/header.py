"""The header of a GGUF file: metadata and the table of tensors, never their data.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
Every count and length is checked against the file's size before anything is allocated for it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from transport.errors import BadCheckpoint

MAX_STRING_BYTES = 16 << 20
MAX_ARRAY_ITEMS = 16 << 20
MAX_ENTRIES = 1 << 20
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """`shape` is in NumPy's order (rows first); `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    format: str
    offset: int
    file_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]


def read_header(path: Path, progress: Progress = lambda done, total: None) -> GgufHeader:
    """Metadata (arrays of numbers as NumPy arrays, of strings as lists) and tensors. Raises BadCheckpoint."""
    try:
        with path.open("rb", buffering=1 << 20) as file:
            return parse_header(path, file, path.stat().st_size, progress)
    except OSError as error:
        raise BadCheckpoint(
            f"can't read {path}: {error.strerror or error}", hint="check the path and its rights"
        ) from error


def parse_header(path: Path, file: BinaryIO, size: int, progress: Progress = lambda done, total: None) -> GgufHeader:
    """As `read_header`, of a file of `size` bytes that is open at its start; `path` is for errors alone."""
    return _HeaderParser(path, file, size, progress).parse()


class _HeaderParser:
    def __init__(self, path: Path, file: BinaryIO, size: int, progress: Progress) -> None:
        self._path = path
        self._file = file
        self._size = size
        self._at = 0
        self._progress = progress

    def parse(self) -> GgufHeader:
        if self._take(4) != b"GGUF":
            raise self._error("it does not start with the GGUF magic")
        version = self._number("<I")
        if version not in (2, 3):
            kind = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
            raise self._error(f"it is {kind}; versions 2 and 3, little-endian, can be read")
        num_tensors = self._count("<Q", MAX_ENTRIES, least_bytes=24, what="tensors")
        num_fields = self._count("<Q", MAX_ENTRIES, least_bytes=13, what="metadata fields")
        metadata: dict[str, Any] = {}
        for index in range(num_fields):
            key = self._string()
            if key in metadata:
                raise self._error(f"metadata field {key!r} appears twice")
            metadata[key] = self._value(self._number("<I"))
            self._progress(index + 1, num_fields)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment > 1 << 20 or alignment & (alignment - 1):
            raise self._error(f"its alignment is {alignment!r}, which is not a power of two")
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        data_start = -(-self._at // alignment) * alignment
        return GgufHeader(metadata=metadata, tensors=self._placed_tensors(entries, data_start, alignment))

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dimensions = self._number("<I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self._error(f"tensor {name!r} has {num_dimensions} dimensions")
        shape = tuple(reversed([self._number("<Q") for _ in range(num_dimensions)]))
        return name, shape, self._number("<I"), self._number("<Q")

    def _placed_tensors(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], data_start: int, alignment: int
    ) -> tuple[GgufTensor, ...]:
        tensors = []
        for name, shape, type_id, relative in entries:
            try:
                kind = GGMLQuantizationType(type_id)
            except ValueError:
                raise self._error(f"tensor {name!r} has the unknown type {type_id}") from None
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if min(shape) < 1 or shape[-1] % block:
                raise self._error(f"tensor {name!r} of shape {shape} can't be of type {kind.name} (blocks of {block})")
            file_bytes = math.prod(shape) // block * block_bytes
            offset = data_start + relative
            if relative % alignment:
                raise self._error(f"tensor {name!r} is not aligned to {alignment} bytes")
            if offset + file_bytes > self._size:
                raise self._error(
                    f"tensor {name!r} ends at byte {offset + file_bytes:,}, but the file has {self._size:,} bytes"
                )
            tensors.append(GgufTensor(name=name, shape=shape, format=kind.name, offset=offset, file_bytes=file_bytes))
        self._check_overlaps(tensors)
        return tuple(tensors)

    def _check_overlaps(self, tensors: list[GgufTensor]) -> None:
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise self._error("a tensor's name appears twice")
        ordered = sorted(tensors, key=lambda tensor: tensor.offset)
        for before, after in pairwise(ordered):
            if before.offset + before.file_bytes > after.offset:
                raise self._error(f"tensors {before.name!r} and {after.name!r} overlap")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._number("<I"))
        return self._numbers(kind, 1)[0].item()

    def _array(self, kind: int) -> Any:
        if kind == _ARRAY:
            raise self._error("it has an array of arrays, which no supported model uses")
        if kind == _STRING:
            count = self._count("<Q", MAX_ARRAY_ITEMS, least_bytes=8, what="strings")
            # Two pieces of a vocabulary that are not UTF-8 must not become the same: whoever uses them is to see it.
            return [self._string("surrogateescape") for _ in range(count)]
        return self._numbers(kind, self._count("<Q", MAX_ARRAY_ITEMS, least_bytes=1, what="numbers"))

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _SCALARS:
            raise self._error(f"a metadata field has the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype=dtype)

    def _count(self, form: str, limit: int, *, least_bytes: int, what: str) -> int:
        count = self._number(form)
        if count > limit or count * least_bytes > self._size - self._at:
            raise self._error(f"it announces {count:,} {what}, more than the file can hold")
        return count

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _string(self, errors: str = "replace") -> str:
        length = int.from_bytes(self._take(8), "little")
        if length > MAX_STRING_BYTES:
            raise self._error(f"it has a string of {length:,} bytes")
        return self._take(length).decode("utf-8", errors=errors)

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise self._error(f"it ends at byte {self._size:,}, inside its header")
        data = self._file.read(count)
        if len(data) != count:
            raise self._error(f"it ended while being read, at byte {self._at + len(data):,}")
        self._at += count
        return data

    def _error(self, why: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self._path} is not a GGUF file that can be used: {why}", hint="download it again")
