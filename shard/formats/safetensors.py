"""The safetensors files of a folder: their headers, checked, and reading their tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shard.formats.config import is_decoder_tensor
from shard.formats.dtypes import NUMPY_DTYPE, from_bfloat16, store_floats
from shard.formats.weight_folder import WeightFolder
from transport.errors import BadCheckpoint, UnsupportedModel
from transport.messages.ring import DType

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


class _TensorEntry(msgspec.Struct, frozen=True):
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
        raise _header_error(path, f"its header would take {length:,} bytes of a file of {size:,}")
    return LENGTH_BYTES + length


def parse_header(path: Path, start: bytes, size: int) -> tuple[PlacedTensor, ...]:
    """The tensors of a file of `size` bytes at `path` that begins with `start`: its whole header or more. Never touches
    the file. Raises BadCheckpoint."""
    data_start = header_bytes(path, start, size)
    if len(start) < data_start:
        raise _header_error(path, f"its header takes {data_start:,} bytes, of which {len(start):,} are there")
    entries = _entries(path, start[LENGTH_BYTES:data_start])
    tensors = [_placed(path, name, raw, data_start, size) for name, raw in entries]
    ordered = sorted((tensor for tensor in tensors if tensor.file_bytes), key=lambda tensor: tensor.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.file_bytes > after.offset:
            raise _header_error(path, f"tensors {before.name!r} and {after.name!r} overlap")
    return tuple(tensors)


def _entries(path: Path, header: bytes) -> list[tuple[str, Any]]:
    try:
        entries = msgspec.json.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _header_error(path, f"its header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _header_error(path, "its header is not a JSON object")
    return [(name, raw) for name, raw in entries.items() if name != "__metadata__"]


def _placed(path: Path, name: str, raw: Any, data_start: int, size: int) -> PlacedTensor:
    try:
        entry = msgspec.convert(raw, _TensorEntry)
    except msgspec.ValidationError as error:
        raise _header_error(path, f"tensor {name!r} is described wrongly ({error})") from error
    if entry.dtype not in ELEMENT_BYTES:
        raise _header_error(path, f"tensor {name!r} has the unknown dtype {entry.dtype!r}")
    if len(entry.shape) > MAX_DIMENSIONS or any(side < 0 for side in entry.shape):
        raise _header_error(path, f"tensor {name!r} has the shape {entry.shape}")
    begin, end = entry.data_offsets
    if begin < 0 or end < begin:
        raise _header_error(path, f"tensor {name!r} lies at bytes {begin} to {end}")
    expected = math.prod(entry.shape) * ELEMENT_BYTES[entry.dtype]
    if end - begin != expected:
        raise _header_error(path, f"tensor {name!r} has {end - begin:,} bytes where its shape needs {expected:,}")
    if data_start + end > size:
        raise _header_error(path, f"tensor {name!r} ends at byte {data_start + end:,}, but the file has {size:,} bytes")
    return PlacedTensor(
        name=name, shape=entry.shape, format=entry.dtype, path=path, offset=data_start + begin, file_bytes=expected
    )


def _header_error(path: Path, why: str) -> BadCheckpoint:
    return BadCheckpoint(
        f"{path} is truncated or not a safetensors file: {why}", hint="download it again, or delete it and pull"
    )


FLOATS: Mapping[str, DType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_RAW_DTYPE = {format: NUMPY_DTYPE[dtype].newbyteorder("<") for format, dtype in FLOATS.items()}
_BLOCK_ELEMENTS = 1 << 19
WEIGHT_INDEX = "model.safetensors.index.json"


class SafetensorsFiles:
    """Every file's header is read and checked here, so that a truncated file is found before anything is loaded."""

    def __init__(self, weights: WeightFolder) -> None:
        self.folder = weights.path
        self._weights = weights
        self.placed: dict[str, PlacedTensor] = {}
        files = weight_files(self.folder)
        for path in files:
            for tensor in read_header(path, weights.size_bytes(path.name)):
                if tensor.name in self.placed:
                    raise BadCheckpoint(
                        f"tensor {tensor.name!r} is both in {self.placed[tensor.name].path.name} and in {path.name}",
                        hint=f"keep one set of weights in {self.folder}",
                    )
                self.placed[tensor.name] = tensor
        self._check_against_index({path.name for path in files})
        self.file_bytes = sum(weights.size_bytes(path.name) for path in files)

    def read_bytes(self, tensor: PlacedTensor, out: np.ndarray, first_byte: int = 0) -> None:
        """Fill the contiguous `out`, of any dtype, with the tensor's bytes from `first_byte` on."""
        self._weights.read(tensor.path.name, out, tensor.offset + first_byte, f"{tensor.name} in {tensor.path}")

    def read_floats(self, tensor: PlacedTensor, first: int, out: np.ndarray, dtype: DType) -> None:
        """Fill the contiguous `out` with the tensor's elements from `first` on, as `dtype`, to the nearest.

        Raises UnsupportedModel for a tensor that does not hold floats.
        """
        if tensor.format not in FLOATS:
            raise UnsupportedModel(
                f"{tensor.name} in {tensor.path} is stored as {tensor.format}",
                hint="weights in F32, F16 or BF16 can be read; take another form of the model",
            )
        raw_dtype = _RAW_DTYPE[tensor.format]
        if FLOATS[tensor.format] == dtype:
            self.read_bytes(tensor, out, first * raw_dtype.itemsize)
            return
        flat = out.reshape(-1)
        buffer = np.empty(min(_BLOCK_ELEMENTS, flat.size), raw_dtype)
        for done in range(0, flat.size, _BLOCK_ELEMENTS):
            data = buffer[: flat.size - done]
            self.read_bytes(tensor, data, (first + done) * raw_dtype.itemsize)
            values = from_bfloat16(data) if tensor.format == "BF16" else data.astype(np.float32)
            store_floats(values, flat[done : done + len(data)], dtype)

    def close(self) -> None:
        self._weights.close()

    def _check_against_index(self, chosen: set[str]) -> None:
        for name, file in _weight_map(self.folder).items():
            if file not in chosen:
                continue
            if name not in self.placed or self.placed[name].path.name != file:
                raise BadCheckpoint(
                    f"{self.folder / WEIGHT_INDEX} says that {name!r} is in {file}, but it is not",
                    hint="the files are of different versions; pull the model again",
                )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model: of an index, those with tensors that stages may load; the others need
    not be there. Raises BadCheckpoint or UnsupportedModel when there are none."""
    mapped = sorted({file for name, file in _weight_map(folder).items() if is_decoder_tensor(name)})
    if mapped:
        missing = [file for file in mapped if not (folder / file).is_file()]
        if missing:
            raise BadCheckpoint(
                f"{folder} lacks {', '.join(missing[:3])} ({len(missing)} of {len(mapped)} weight files)",
                hint="the download did not complete; pull the model again",
            )
        return [folder / file for file in mapped]
    whole = folder / "model.safetensors"
    found = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    found = [path for path in found if not path.name.startswith("adapter_")]
    if found:
        return found
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise UnsupportedModel(
            f"{folder} holds only pickled weights (.bin, .pth), which can run code when they are opened",
            hint="take the model's safetensors or GGUF files",
        )
    raise BadCheckpoint(f"{folder} holds no *.safetensors file", hint="pull the model again")


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name → file name, from the index; empty without one."""
    path = folder / WEIGHT_INDEX
    if not path.is_file():
        return {}
    try:
        mapping = msgspec.convert(msgspec.json.decode(path.read_bytes())["weight_map"], dict[str, str])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{path} is not an index of weights: {error}", hint="download it again") from error
    for file in mapping.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise BadCheckpoint(f"{path} points to {file!r}, outside the model's folder", hint="don't use this model")
    return mapping
