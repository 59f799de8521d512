"""Folders that mlx-lm has written: the numbers are those of mx.dequantize, and the tensors those of the model."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from shard.formats.checkpoint import DenseView
from shard.formats.safetensors_checkpoint import SafetensorsCheckpoint
from tests.support.shard import tiny
from tests.support.shard.mlx_folders import COLUMNS, UP, mx, packed, write, written_by_mlx_lm
from tests.support.shard.safetensors_folders import CONFIG
from tests.support.shard.stage_runner import load_stage, run_step, tiny_spec
from transport.errors import BadCheckpoint, PotluckError, UnsupportedModel
from transport.messages.ring import Entry, SequenceId


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_numbers_are_mlx_own(tmp_path: Path, bits: int, group: int, dtype: str) -> None:
    module = UP.format(0)
    parts, exact = packed(48, bits, group, dtype=getattr(mx, dtype))
    checkpoint = SafetensorsCheckpoint(write(tmp_path, {module: parts}, {"bits": bits, "group_size": group}))
    info = checkpoint.tensors[f"{module}.weight"]
    assert (info.shape, info.format) == ((48, COLUMNS), f"MLX {bits}-bit")
    assert info.affine is not None and (info.affine.bits, info.affine.group, info.affine.exact) == (bits, group, True)
    for first, last in [(0, 48), (5, 6), (7, 31), (48, 48)]:
        rows = checkpoint.read_affine(info.name, first, last - first)
        np.testing.assert_array_equal(rows.dequantized(), exact[first:last])
        dense = np.empty((last - first, COLUMNS), np.float32)
        checkpoint.read_rows(info.name, first, dense, "float32")
        np.testing.assert_array_equal(dense, exact[first:last])
    halves = np.empty(info.shape, np.float16)
    checkpoint.read_into(info.name, halves, "float16")
    np.testing.assert_array_equal(halves, exact.astype(np.float16))


def test_only_logical_tensors_are_seen(tmp_path: Path) -> None:
    parts, _ = packed(16, 4, 64)
    folder = write(tmp_path, {UP.format(0): parts, UP.format(1): parts}, {"bits": 4, "group_size": 64})
    checkpoint = SafetensorsCheckpoint(folder)
    assert set(checkpoint.tensors) == {
        "model.norm.weight",
        "model.embed_tokens.weight",
        *(UP.format(layer) + ".weight" for layer in range(2)),
    }
    assert "quantization" not in checkpoint.config and "quantization_config" not in checkpoint.config
    assert checkpoint.spec.layer_params == (16 * COLUMNS,) * 2
    assert checkpoint.tensors["model.norm.weight"].affine is None
    file_bytes = sum(array.nbytes for array in parts.values())
    assert checkpoint.tensors[UP.format(0) + ".weight"].file_bytes == file_bytes


def test_layers_can_differ(tmp_path: Path) -> None:
    four, exact4 = packed(16, 4, 64)
    eight, exact8 = packed(16, 8, 32)
    quantization = {
        "bits": 4,
        "group_size": 64,
        "mode": "affine",
        UP.format(1): {"bits": 8, "group_size": 32},
        "lm_head": False,
    }
    checkpoint = SafetensorsCheckpoint(write(tmp_path, {UP.format(0): four, UP.format(1): eight}, quantization))
    for layer, exact in enumerate((exact4, exact8)):
        rows = checkpoint.read_affine(UP.format(layer) + ".weight", 0, 16)
        np.testing.assert_array_equal(rows.dequantized(), exact)
    assert checkpoint.tensors[UP.format(1) + ".weight"].format == "MLX 8-bit"


@pytest.mark.parametrize(
    ("block", "projection", "expected"),
    [
        ("mlp", "gate_proj", "mlp.experts.{}.gate_proj"),
        ("mlp", "down_proj", "mlp.experts.{}.down_proj"),
        ("block_sparse_moe", "gate_proj", "block_sparse_moe.experts.{}.w1"),
        ("block_sparse_moe", "down_proj", "block_sparse_moe.experts.{}.w2"),
        ("block_sparse_moe", "up_proj", "block_sparse_moe.experts.{}.w3"),
    ],
)
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("dense", [False, True])
def test_stacked_experts_are_tensors_of_their_own(
    tmp_path: Path, block: str, projection: str, expected: str, experts: int, dense: bool
) -> None:
    parts, exact = packed(24, 4, 32, experts=experts)
    if dense:
        parts = {"weight": mx.array(exact)}
    module = f"model.layers.0.{block}.switch_mlp.{projection}"
    checkpoint = SafetensorsCheckpoint(write(tmp_path, {module: parts}, {"bits": 4, "group_size": 32}))
    assert not any("switch_mlp" in name for name in checkpoint.tensors)
    for expert in range(experts):
        info = checkpoint.tensors[f"model.layers.0.{expected.format(expert)}.weight"]
        assert info.shape == (24, COLUMNS)
        assert (info.affine is None) == dense
        out = np.empty(info.shape, np.float32)
        checkpoint.read_into(info.name, out, "float32")
        np.testing.assert_array_equal(out, exact[expert])
        tail = np.empty((5, COLUMNS), np.float32)
        checkpoint.read_rows(info.name, 19, tail, "float32")
        np.testing.assert_array_equal(tail, exact[expert][19:])
        if not dense:
            rows = checkpoint.read_affine(info.name, 3, 10)
            np.testing.assert_array_equal(rows.dequantized(), exact[expert][3:13])


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3", "qwen3_moe", "mixtral"])
def test_what_mlx_lm_writes_is_the_model_that_it_runs(tmp_path: Path, family: str) -> None:
    original = tiny.memory_checkpoint(tiny.tiny_model(family, 0), tmp_path / "original")
    model = written_by_mlx_lm(family, tmp_path / "original", tmp_path / "mlx")
    checkpoint = SafetensorsCheckpoint(tmp_path / "mlx")
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        name: array.shape for name, array in original.arrays.items()
    }
    assert sum(info.affine is not None for info in checkpoint.tensors.values()) > len(checkpoint.tensors) // 2
    assert (checkpoint.spec.layer_params, checkpoint.spec.windows) == (
        original.spec.layer_params,
        original.spec.windows,
    )
    ids = list(range(3, 20))
    with mx.stream(mx.cpu):
        theirs = np.array(model(mx.array([ids]))[0])
    for runner, held in (("library", DenseView(checkpoint)), ("mlx", checkpoint)):
        stages = [load_stage(held, tiny_spec(*cut), runner) for cut in ((0, 3), (3, 4))]  # type: ignore[arg-type]
        ours = run_step(stages, [Entry(SequenceId(1), 0, tuple(ids), len(ids))])
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(np.abs(theirs).max()), err_msg=runner)


def without(parts: dict[str, Any], leaf: str) -> dict[str, Any]:
    return {key: array for key, array in parts.items() if key != leaf}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parts: without(parts, "scales"), "no model.layers.0.mlp.up_proj.scales"),
        (lambda parts: without(parts, "biases"), "no model.layers.0.mlp.up_proj.biases"),
        (lambda parts: parts | {"scales": parts["scales"][:-1]}, "needs"),
        (lambda parts: parts | {"biases": parts["biases"][:, :-1]}, "needs"),
        (lambda parts: parts | {"scales": mx.ones((16, 4), mx.int32)}, "stored as I32"),
        (lambda parts: parts | {"weight": mx.ones((16, COLUMNS))}, "as F32"),
        (lambda parts: parts | {"weight": parts["weight"][:, :31]}, "groups of 64"),
        (lambda parts: parts | {"weight": parts["weight"][:, :16]}, "needs"),
        (lambda parts: parts | {"weight": parts["weight"].reshape(-1)}, "packed rows"),
        (lambda parts: parts | {"weight": parts["weight"][:0], "scales": parts["scales"][:0]}, "packed rows"),
    ],
)
def test_parts_that_do_not_fit_are_refused_at_once(tmp_path: Path, change: Any, words: str) -> None:
    parts, _ = packed(16, 4, 64)
    folder = write(tmp_path, {UP.format(0): change(parts)}, {"bits": 4, "group_size": 64})
    with pytest.raises(BadCheckpoint, match=words) as raised:
        SafetensorsCheckpoint(folder)
    assert UP.format(0) in raised.value.message and raised.value.hint


def test_scales_without_weights_and_weights_that_should_be_dense_are_refused(tmp_path: Path) -> None:
    parts, _ = packed(16, 4, 64)
    plain = {"bits": 4, "group_size": 64}
    with pytest.raises(BadCheckpoint, match=r"no lm_head\.weight"):
        SafetensorsCheckpoint(write(tmp_path / "a", {"lm_head": without(parts, "weight")}, plain))
    with pytest.raises(BadCheckpoint, match="not quantized"):
        SafetensorsCheckpoint(write(tmp_path / "b", {"lm_head": parts}, plain | {"lm_head": False}))


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"bits": 4, "group_size": 64, "mode": "mxfp4"}, "mxfp4"),
        ({"bits": 4, "group_size": 32, UP.format(1): {"bits": 8, "group_size": 32, "mode": "nvfp4"}}, "nvfp4"),
        ({"bits": 7, "group_size": 64}, "7 bits"),
        ({"bits": 4, "group_size": 16}, "groups of 16"),
        ({"bits": 4.0, "group_size": 64}, "4.0 bits"),
        ({"bits": True, "group_size": 64}, "True bits"),
        ({"bits": [4], "group_size": {}}, "bits"),
        ({"bits": 4, "group_size": 64, UP.format(1): {"bits": 8}}, UP.format(1)),
        ({"bits": 4, "group_size": 64, "rotation": "hadamard"}, "rotation"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "hqq", "nbits": 4}, "hqq"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_algo": "NVFP4"}, "NVFP4"),
        ({"some": "thing"}, "does not name"),
    ],
)
def test_other_quantizations_are_refused_by_name(tmp_path: Path, quantization: Any, words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words) as raised:
        SafetensorsCheckpoint(write(tmp_path, {}, quantization))
    assert raised.value.hint


def test_a_quantization_that_is_no_object_is_a_bad_file(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="'int4'"):
        SafetensorsCheckpoint(write(tmp_path, {}, "int4"))


@pytest.mark.parametrize("leaf", ["scales", "biases"])
def test_scales_that_are_no_numbers_are_refused_when_read(tmp_path: Path, leaf: str) -> None:
    parts, _ = packed(16, 4, 64)
    broken = np.array(parts[leaf])
    broken[9, 2] = np.inf
    name = UP.format(0)
    checkpoint = SafetensorsCheckpoint(
        write(tmp_path, {name: parts | {leaf: mx.array(broken)}}, {"bits": 4, "group_size": 64})
    )
    checkpoint.read_affine(f"{name}.weight", 0, 9)
    for read in (
        lambda: checkpoint.read_affine(f"{name}.weight", 9, 1),
        lambda: checkpoint.read_into(f"{name}.weight", np.empty((16, COLUMNS), np.float32), "float32"),
    ):
        with pytest.raises(BadCheckpoint, match="infinite"):
            read()


@dataclass(frozen=True, slots=True)
class Small:
    """A folder whose file may be overwritten, and the file as it was."""

    folder: Path
    whole: bytes = field(repr=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("small")
    parts, _ = packed(8, 4, 32, columns=64)
    stacked, _ = packed(4, 4, 32, columns=64, experts=2)
    experts = "model.layers.0.mlp.switch_mlp.gate_proj"
    write(folder, {UP.format(0): parts, experts: stacked}, {"bits": 4, "group_size": 32})
    return Small(folder, (folder / "model.safetensors").read_bytes())


DIGITS_AND_MARKS = list(b'0123456789"[]{},:-')


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_header_with_flipped_bytes_is_read_or_refused_by_an_error_of_ours(small: Small, data: st.DataObject) -> None:
    header_bytes = 8 + int.from_bytes(small.whole[:8], "little")
    changed = bytearray(small.whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header_bytes - 1))
        changed[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(DIGITS_AND_MARKS)))
    (small.folder / "model.safetensors").write_bytes(changed)
    with contextlib.suppress(PotluckError):
        checkpoint = SafetensorsCheckpoint(small.folder)
        try:
            read_everything(checkpoint)
        finally:
            checkpoint.close()


def read_everything(checkpoint: SafetensorsCheckpoint) -> None:
    for name, info in checkpoint.tensors.items():
        if info.affine is not None:
            checkpoint.read_affine(name, 0, math.prod(info.shape[:-1]))
        out = np.empty(info.shape, np.float32)
        try:
            checkpoint.read_into(name, out, "float32")
        except UnsupportedModel:  # As integers, for example.
            continue


def test_a_dense_folder_may_hold_tensors_called_scales(tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"x.scales": np.ones((2, 2), np.float32)}, folder / "model.safetensors")
    assert set(SafetensorsCheckpoint(folder).tensors) == {"x.scales"}
