"""The safetensors files of a folder: which tensors they hold, and reading them, whatever the tensors stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shard.float_formats import from_bfloat16, store_floats
from shard.model_facts import is_a_decoders
from shard.safetensors_header import PlacedTensor, read_header
from shard.weight_folder import WeightFolder
from transport.errors import BadCheckpoint, UnsupportedModel
from transport.messages import DType

FLOATS: Mapping[str, DType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_RAW_DTYPE: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
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
    mapped = sorted({file for name, file in _weight_map(folder).items() if is_a_decoders(name)})
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
