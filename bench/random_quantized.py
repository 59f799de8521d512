"""Random checkpoints that are quantized on disk, as mlx-lm writes them: `random_checkpoint`'s shapes in few bits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bench.random_checkpoint import LlamaShape

_FILE_BYTES = 2**30
_BLOCK_BYTES = 1 << 24
_FORMATS = {"U32": 4, "BF16": 2}

Stored = tuple[str, str, tuple[int, ...]]
"""Name, safetensors format, shape."""


def write_quantized(shape: LlamaShape, folder: Path, *, bits: int = 4, group: int = 64, seed: int = 0) -> Path:
    """Matrices, the embedding too, as uniform q of `bits` bits with bfloat16 scales and biases such that weights have a
    variance of about 1/fan-in; norms 1. Streamed to safetensors files of about 1 GiB, which are then no longer in the
    page cache."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**shape.config(), "quantization": {"bits": bits, "group_size": group}}
    (folder / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(seed)
    files = _split(stored_tensors(shape, bits=bits, group=group))
    weight_map = {}
    for number, tensors in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(folder / name, tensors, bits, group, generator)
        weight_map.update({stored[0]: name for stored in tensors})
    total = sum(_num_bytes(stored) for tensors in files for stored in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def stored_tensors(shape: LlamaShape, *, bits: int, group: int) -> Iterator[Stored]:
    for name, dims in shape.tensors().items():
        if len(dims) == 1:
            yield name, "BF16", dims
            continue
        rows, columns = dims
        module = name.removesuffix(".weight")
        yield name, "U32", (rows, columns * bits // 32)
        for part in ("scales", "biases"):
            yield f"{module}.{part}", "BF16", (rows, columns // group)


def forget_pages(folder: Path) -> None:
    """Take the folder's files out of the page cache, where the system can: the next read is from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _num_bytes(stored: Stored) -> int:
    _, kind, dims = stored
    return int(np.prod(dims)) * _FORMATS[kind]


def _split(tensors: Iterator[Stored]) -> list[list[Stored]]:
    files: list[list[Stored]] = [[]]
    size = 0
    for stored in tensors:
        if size > _FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(stored)
        size += _num_bytes(stored)
    return files


def _write_file(path: Path, tensors: list[Stored], bits: int, group: int, generator: np.random.Generator) -> None:
    header: dict[str, object] = {}
    offset = 0
    for stored in tensors:
        name, kind, dims = stored
        size = _num_bytes(stored)
        header[name] = {"dtype": kind, "shape": list(dims), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name, kind, dims in tensors:
            if kind == "U32":
                _write_random(file.write, _num_bytes((name, kind, dims)), generator)
            else:
                file.write(_factors(name, dims, bits, group).tobytes())


def _write_random(write: Callable[[bytes], int], size: int, generator: np.random.Generator) -> None:
    for done in range(0, size, _BLOCK_BYTES):
        write(generator.bytes(min(_BLOCK_BYTES, size - done)))


def _factors(name: str, dims: tuple[int, ...], bits: int, group: int) -> np.ndarray:
    """bfloat16 bits: the upper half of a float32. Scales vary by group, so that none is like the next."""
    if name.endswith("norm.weight"):
        return np.full(dims, 0x3F80, np.uint16)
    width = (12.0 / (dims[1] * group)) ** 0.5 / 2**bits
    wave = 1.0 + 0.25 * np.sin(np.arange(np.prod(dims), dtype=np.float32)).reshape(dims)
    scales = (np.float32(width) * wave).astype(np.float32)
    if name.endswith(".biases"):
        scales *= np.float32(-(2**bits - 1) / 2)
    return (scales.view(np.uint32) >> 16).astype(np.uint16)
