"""A Hugging Face folder: config.json and one or several safetensors files, with or without an index."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shard.checkpoint import TensorInfo
from shard.file_blocks import read_exactly
from shard.float_formats import check_output, from_bfloat16, store_floats
from shard.model_facts import read_config, spec_from
from shard.safetensors_header import PlacedTensor, read_header
from shard.spec import ModelSpec
from transport.errors import BadCheckpoint, UnsupportedModel
from transport.messages import DType

_FILE_DTYPE: dict[str, DType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_RAW_DTYPE: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_BLOCK_ELEMENTS = 1 << 19
_WEIGHT_INDEX = "model.safetensors.index.json"


class SafetensorsCheckpoint:
    """Every file's header is read and checked here, so that a truncated file is found before anything is loaded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = read_config(folder)
        self._placed: dict[str, PlacedTensor] = {}
        self._fds: dict[Path, int] = {}
        files = weight_files(folder)
        for path in files:
            for tensor in read_header(path):
                if tensor.name in self._placed:
                    raise BadCheckpoint(
                        f"tensor {tensor.name!r} is both in {self._placed[tensor.name].path.name} and in {path.name}",
                        hint=f"keep one set of weights in {folder}",
                    )
                self._placed[tensor.name] = tensor
        self._check_against_index()
        self._file_bytes = sum(path.stat().st_size for path in files)
        self._infos = {
            tensor.name: TensorInfo(
                name=tensor.name, shape=tensor.shape, format=tensor.format, file_bytes=tensor.file_bytes
            )
            for tensor in self._placed.values()
        }

    @property
    def config(self) -> dict[str, Any]:
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @cached_property
    def spec(self) -> ModelSpec:
        return spec_from(self._config, self._infos, file_bytes=self._file_bytes)

    def read_into(self, name: str, out: np.ndarray, dtype: DType) -> None:
        tensor = self._placed.get(name)
        if tensor is None:
            raise BadCheckpoint(
                f"{self._folder} holds no tensor {name!r}", hint="a file is missing; pull the model again"
            )
        check_output(name, tensor.shape, out, dtype)
        if tensor.format not in _FILE_DTYPE:
            raise UnsupportedModel(
                f"{name} in {tensor.path} is stored as {tensor.format}",
                hint="weights in F32, F16 or BF16 can be read; take another form of the model",
            )
        fd = self._descriptor(tensor.path)
        what = f"{name} in {tensor.path}"
        if _FILE_DTYPE[tensor.format] == dtype:
            read_exactly(fd, out, tensor.offset, what)
            return
        flat = out.reshape(-1)
        raw_dtype = _RAW_DTYPE[tensor.format]
        buffer = np.empty(min(_BLOCK_ELEMENTS, flat.size), raw_dtype)
        for first in range(0, flat.size, _BLOCK_ELEMENTS):
            data = buffer[: flat.size - first]
            read_exactly(fd, data, tensor.offset + first * raw_dtype.itemsize, what)
            values = from_bfloat16(data) if tensor.format == "BF16" else data.astype(np.float32)
            store_floats(values, flat[first : first + len(data)], dtype)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _descriptor(self, path: Path) -> int:
        if path not in self._fds:
            try:
                self._fds[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            except OSError as error:
                raise BadCheckpoint(f"can't open {path}: {error.strerror}", hint="pull the model again") from error
        return self._fds[path]

    def _check_against_index(self) -> None:
        for name, file in _weight_map(self._folder).items():
            if name not in self._placed or self._placed[name].path.name != file:
                raise BadCheckpoint(
                    f"{self._folder / _WEIGHT_INDEX} says that {name!r} is in {file}, but it is not",
                    hint="the files are of different versions; pull the model again",
                )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model. Raises BadCheckpoint or UnsupportedModel when there are none."""
    mapped = sorted(set(_weight_map(folder).values()))
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
    path = folder / _WEIGHT_INDEX
    if not path.is_file():
        return {}
    try:
        mapping = msgspec.convert(msgspec.json.decode(path.read_bytes())["weight_map"], dict[str, str])
    except (OSError, msgspec.MsgspecError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{path} is not an index of weights: {error}", hint="download it again") from error
    for file in mapping.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise BadCheckpoint(f"{path} points to {file!r}, outside the model's folder", hint="don't use this model")
    return mapping
