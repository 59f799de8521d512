"""Ingesting parses a .gguf once into a folder that opens at once; the weights stay in the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from shard.formats.checkpoint import TensorInfo
from shard.formats.config import spec_from
from shard.formats.families import Family, family_of
from shard.formats.gguf.config import ROPE_FACTORS, config_from, hugging_face_name
from shard.formats.gguf.header import GgufHeader, GgufTensor, Progress, read_header
from shard.formats.gguf.index import INDEX_VERSION, GgufIndex, IndexedTensor, write_index
from shard.formats.gguf.quants import check_format, dequantize_rows
from shard.formats.gguf.tokenizer import write_tokenizer
from shard.formats.weight_folder import read_exactly
from transport.errors import BadCheckpoint

_MAX_ROPE_FACTORS = 4096


def ingest_gguf(file: Path, folder: Path, *, recorded_as: str, progress: Progress = lambda done, total: None) -> None:
    """Write what `GgufCheckpoint` and AutoTokenizer need into the existing `folder`.

    `recorded_as` is how the index will find the file: its name if it lies (or will lie) in `folder`, else its absolute
    path. `progress(done, total)` counts steps. Raises BadCheckpoint or UnsupportedModel, before anything is usable.
    """
    before = file.stat()
    header = read_header(file, lambda done, total: progress(done, total + 1))
    config = config_from(header, _rope_factors(file, header))
    family = family_of(config)
    for form in sorted({tensor.format for tensor in header.tensors}):
        check_format(form)
    tensors = tuple(_indexed(family, config, tensor) for tensor in header.tensors if tensor.name != ROPE_FACTORS)
    index = GgufIndex(
        version=INDEX_VERSION, file=recorded_as, size_bytes=before.st_size, mtime_ns=before.st_mtime_ns, tensors=tensors
    )
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    write_tokenizer(header.metadata, config["max_position_embeddings"], folder)
    write_index(folder, index)
    _check_complete(config, tensors, before.st_size)
    progress(1, 1)


def _check_complete(config: dict[str, Any], tensors: tuple[IndexedTensor, ...], file_bytes: int) -> None:
    """Raise BadCheckpoint now rather than when the first worker loads."""
    infos = {
        tensor.name: TensorInfo(
            name=tensor.name, shape=tensor.shape, format=tensor.format, file_bytes=tensor.file_bytes
        )
        for tensor in tensors
    }
    spec = spec_from(config, infos, file_bytes=file_bytes)
    first = {name.removeprefix("model.layers.0."): info.shape for name, info in infos.items() if "layers.0." in name}
    for layer in range(1, spec.num_layers):
        for rest, shape in first.items():
            info = infos.get(f"model.layers.{layer}.{rest}")
            if info is None or info.shape != shape:
                raise BadCheckpoint(
                    f"layer {layer} has no {rest} of shape {shape}, unlike layer 0", hint="download the GGUF again"
                )


def _indexed(family: Family, config: dict[str, Any], tensor: GgufTensor) -> IndexedTensor:
    name = hugging_face_name(family, tensor.name)
    interleaved = family.gguf is not None and family.gguf.interleaved_rotary
    rotary_heads = None
    if interleaved and ".self_attn.q_proj." in name:
        rotary_heads = config["num_attention_heads"]
    elif interleaved and ".self_attn.k_proj." in name:
        rotary_heads = config["num_key_value_heads"]
    if rotary_heads is not None and tensor.shape[0] % (2 * rotary_heads):
        raise BadCheckpoint(
            f"{tensor.name} has {tensor.shape[0]} rows, which {rotary_heads} heads can't share",
            hint="download it again",
        )
    return IndexedTensor(
        name=name,
        shape=tensor.shape,
        format=tensor.format,
        offset=tensor.offset,
        file_bytes=tensor.file_bytes,
        rotary_heads=rotary_heads,
        plus_one=family.norm_plus_one and name.endswith("norm.weight"),
    )


def _rope_factors(file: Path, header: GgufHeader) -> np.ndarray | None:
    for tensor in header.tensors:
        if tensor.name == ROPE_FACTORS:
            if tensor.format != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > _MAX_ROPE_FACTORS:
                raise BadCheckpoint(f"{ROPE_FACTORS} is {tensor.format} {tensor.shape}", hint="download it again")
            data = np.empty((1, tensor.file_bytes), np.uint8)
            fd = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            try:
                read_exactly(fd, data, tensor.offset, f"{ROPE_FACTORS} in {file}")
            finally:
                os.close(fd)
            return dequantize_rows(data, "F32").reshape(-1)
    return None
