"""Hugging Face folders: exact values in every dtype, and no header that can mislead us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shard.formats.safetensors_checkpoint import SafetensorsCheckpoint
from shard.pieces.open import open_checkpoint
from tests.support.shard.safetensors_folders import CONFIG, tensors, write_folder, write_parts
from transport.errors import BadCheckpoint, ModelNotFound, UnsupportedModel
from transport.messages.ring import DType

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def read(checkpoint: SafetensorsCheckpoint, name: str, dtype: DType) -> torch.Tensor:
    out = np.empty(checkpoint.tensors[name].shape, NUMPY[dtype])
    checkpoint.read_into(name, out, dtype)
    tensor = torch.from_numpy(out)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_are_those_torch_converts_to(tmp_path: Path, stored: torch.dtype, dtype: DType) -> None:
    weights = tensors(stored)
    checkpoint = SafetensorsCheckpoint(write_folder(tmp_path, weights))
    for name, tensor in weights.items():
        expected = tensor.to(getattr(torch, dtype))
        actual = read(checkpoint, name, dtype)
        assert torch.equal(torch.isnan(actual), torch.isnan(expected))
        assert torch.equal(torch.nan_to_num(actual.float()), torch.nan_to_num(expected.float())), name


def test_a_tensor_of_many_blocks_is_whole(tmp_path: Path) -> None:
    large = torch.randn(1100, 1000)
    checkpoint = SafetensorsCheckpoint(write_folder(tmp_path, tensors() | {"large": large}))
    assert torch.equal(read(checkpoint, "large", "bfloat16"), large.to(torch.bfloat16))
    assert torch.equal(read(checkpoint, "large", "float32"), large)


def test_no_file_stays_mapped(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors()))
    checkpoint.read_into("lm_head.weight", np.empty((11, 8), np.float32), "float32")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    assert str(tmp_path) not in maps.read_text()


def test_parts_with_an_index_are_one_model(tmp_path: Path) -> None:
    weights = tensors()
    checkpoint = SafetensorsCheckpoint(write_parts(tmp_path, weights))
    assert set(checkpoint.tensors) == set(weights)
    assert checkpoint.spec.layer_params == (128, 128)
    for name, tensor in weights.items():
        assert torch.equal(torch.nan_to_num(read(checkpoint, name, "float32")), torch.nan_to_num(tensor))


def test_an_output_of_another_shape_or_dtype_is_a_callers_mistake(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(write_folder(tmp_path, tensors()))
    for out in (np.empty((8, 11), np.float32), np.empty((11, 8), np.float64), np.empty((8, 11), np.float32).T):
        with pytest.raises(ValueError, match="lm_head"):
            checkpoint.read_into("lm_head.weight", out, "float32")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        open_checkpoint(tmp_path)
    parts = write_parts(tmp_path / "parts", tensors())
    (parts / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"model-00002-of-00005\.safetensors"):
        open_checkpoint(parts)
    whole = write_folder(tmp_path / "whole", tensors())
    with pytest.raises(BadCheckpoint, match="no tensor 'x'"):
        open_checkpoint(whole).read_into("x", np.empty(1, np.float32), "float32")
    (whole / "model.safetensors").rename(whole / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="pickled"):
        open_checkpoint(whole)


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "model", tensors())
    index = folder / "model.safetensors.index.json"
    mapping = json.loads(index.read_text())["weight_map"]
    for name, file in (("lm_head.weight", "../other.safetensors"), ("more", mapping["lm_head.weight"])):
        index.write_text(json.dumps({"weight_map": mapping | {name: file}}))
        with pytest.raises(BadCheckpoint):
            open_checkpoint(folder)


def test_a_truncated_file_is_found_before_loading(tmp_path: Path) -> None:
    file = write_folder(tmp_path, tensors()) / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 4, 8, 50, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(BadCheckpoint, match=r"model\.safetensors") as raised:
            open_checkpoint(tmp_path)
        assert raised.value.hint


def test_a_file_cut_after_opening_is_found_on_reading(tmp_path: Path) -> None:
    file = write_folder(tmp_path, {"z": torch.ones(1000)} | tensors()) / "model.safetensors"
    checkpoint = open_checkpoint(tmp_path)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 8)
    with pytest.raises(BadCheckpoint, match="cut off"):
        for name, info in checkpoint.tensors.items():
            checkpoint.read_into(name, np.empty(info.shape, np.float32), "float32")


def header_of(entries: Any, size: int = 64) -> bytes:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


def entry(dtype: Any = "F32", shape: Any = (4,), begin: Any = 0, end: Any = 16) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        (1 << 63).to_bytes(8, "little") + bytes(64),
        (200 << 20).to_bytes(8, "little") + bytes(64),
        header_of(b"not json"),
        header_of(b"[1, 2]"),
        header_of(b"[" * 100_000),
        header_of(b'{"\x80": 1}'),
        header_of({"x": 5}),
        header_of({"x": {"dtype": "F32", "shape": [4]}}),
        header_of({"x": entry(dtype="F33")}),
        header_of({"x": entry(shape=[-4])}),
        header_of({"x": entry(shape=[1 << 40, 1 << 40])}),
        header_of({"x": entry(shape=[2] * 2000)}),
        header_of({"x": entry(shape=["4"])}),
        header_of({"x": entry(begin=-16, end=0)}),
        header_of({"x": entry(begin=16, end=0)}),
        header_of({"x": entry(end=20)}),
        header_of({"x": entry(begin=56, end=72)}),
        header_of({"x": entry(begin=1 << 70, end=(1 << 70) + 16)}),
        header_of({"x": entry(), "y": entry(begin=8, end=24)}),
    ],
)
def test_lying_headers_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"\x80": 1}', b"[]", b"{", b""])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_none_is_refused(tmp_path: Path, file: str, content: bytes) -> None:
    (write_folder(tmp_path, tensors()) / file).write_bytes(content)
    with pytest.raises(BadCheckpoint, match=file) as raised:
        open_checkpoint(tmp_path)
    assert raised.value.hint


def test_integers_are_listed_but_not_read_as_weights(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(write_folder(tmp_path, tensors() | {"ids": torch.arange(4)}))
    with pytest.raises(UnsupportedModel, match="I64"):
        checkpoint.read_into("ids", np.empty(4, np.float32), "float32")
