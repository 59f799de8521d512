"""Quantizing on load: no more error than MLX's own, never the dense whole, and nothing but matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shard.formats.affine import AFFINE_BITS, AFFINE_GROUPS, AffineForm, quantize_rows
from shard.formats.checkpoint import DenseView, QuantizeOnLoad, TensorInfo, on_load_form
from shard.formats.safetensors_checkpoint import SafetensorsCheckpoint
from shard.pieces.open import open_checkpoint
from shard.worker.load import in_weights_form, load_shard
from tests.support.shard.mlx_folders import UP, packed
from tests.support.shard.mlx_folders import write as write_mlx
from tests.support.shard.safetensors_folders import write_folder
from tests.support.shard.tiny import memory_checkpoint, quantized_checkpoint, tiny_model
from transport.errors import BadCheckpoint

mx = pytest.importorskip("mlx.core")


def rms(error: np.ndarray) -> float:
    return float(np.sqrt(np.square(error, dtype=np.float64).mean()))


def mlx_numbers(values: np.ndarray, bits: int, group: int) -> np.ndarray:
    with mx.stream(mx.cpu):
        quantized = mx.quantize(mx.array(values), group_size=group, bits=bits)
        return np.array(mx.dequantize(*quantized, group_size=group, bits=bits))


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("group", AFFINE_GROUPS)
@pytest.mark.parametrize("tail", ["normal", "heavy"])
def test_the_error_is_at_most_mlxs(bits: int, group: int, tail: str) -> None:
    draw = np.random.default_rng(bits * group)
    values = draw.standard_normal((64, 1024)) if tail == "normal" else draw.standard_t(4, (64, 1024))
    values = (0.02 * values).astype(np.float32)
    rows = quantize_rows(values, bits, group)
    assert rows.q.max() < 2**bits
    assert rms(rows.dequantized() - values) <= rms(mlx_numbers(values, bits, group) - values)


@settings(max_examples=100, deadline=None)
@given(
    bits=st.sampled_from(AFFINE_BITS),
    scale=st.sampled_from([1e-30, 1e-8, 1e-3, 1.0, 1e4, 1e30]),
    offset=st.sampled_from([0.0, 1.0, -100.0]),
    seed=st.integers(0, 1000),
)
def test_no_weight_is_off_by_more_than_a_step(bits: int, scale: float, offset: float, seed: int) -> None:
    values = np.random.default_rng(seed).uniform(-1, 1, (4, 64)).astype(np.float32) + np.float32(offset)
    values *= np.float32(scale)
    rows = quantize_rows(values, bits, 32)
    assert np.isfinite(rows.scales).all() and np.isfinite(rows.biases).all()
    groups = values.reshape(4, 2, 32)
    step = (groups.max(axis=2) - groups.min(axis=2)) / (2**bits - 1)
    tolerance = np.repeat(step, 32, axis=1) + 1e-6 * np.abs(values)
    assert (np.abs(rows.dequantized() - values) <= tolerance).all()


def test_constant_groups_are_exact() -> None:
    values = np.zeros((3, 64), np.float32)
    values[1] = 0.3
    values[2, :32] = -7e-5
    rows = quantize_rows(values, 4, 32)
    np.testing.assert_array_equal(rows.dequantized(), values)
    assert (rows.scales > 0).all()


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (64, 128), 64),
        ("model.layers.0.mlp.gate_proj.weight", (64, 96), 32),
        ("model.layers.0.mlp.experts.3.w1.weight", (64, 64), 64),
        ("model.embed_tokens.weight", (100, 64), 64),
        ("lm_head.weight", (100, 64), 64),
        ("model.layers.0.mlp.down_proj.weight", (64, 48), None),
        ("model.layers.0.mlp.gate.weight", (4, 64), None),
        ("model.layers.0.block_sparse_moe.gate.weight", (4, 64), None),
        ("model.layers.0.mlp.router.weight", (4, 64), None),
        ("model.layers.0.self_attn.q_proj.bias", (64,), None),
        ("model.layers.0.input_layernorm.weight", (64,), None),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 64, 64), None),
    ],
)
def test_only_matrices_are_quantized(name: str, shape: tuple[int, ...], expected: int | None) -> None:
    form = on_load_form(TensorInfo(name=name, shape=shape, format="BF16", file_bytes=0), 4)
    assert form == (None if expected is None else AffineForm(bits=4, group=expected, exact=False))


def test_any_range_of_rows_is_that_part_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = memory_checkpoint(tiny_model("llama", 0), tmp_path)
    checkpoint = QuantizeOnLoad(inner, 4)
    monkeypatch.setattr("shard.formats.checkpoint._BLOCK_ELEMENTS", 700)
    for name, info in checkpoint.tensors.items():
        if info.affine is None:
            assert info.shape == (64,)
            continue
        whole = quantize_rows(inner.arrays[name], 4, info.affine.group)
        for first, last in [(0, info.shape[0]), (3, 4), (5, 30), (7, 7)]:
            rows = checkpoint.read_affine(name, first, last - first)
            np.testing.assert_array_equal(rows.q, whole.q[first:last])
            np.testing.assert_array_equal(rows.scales, whole.scales[first:last])
            np.testing.assert_array_equal(rows.biases, whole.biases[first:last])


def test_the_dense_whole_is_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = memory_checkpoint(tiny_model("llama", 0), tmp_path)
    name = "model.embed_tokens.weight"
    inner.arrays[name] = np.random.default_rng(0).standard_normal((20_000, 128)).astype(np.float32)
    largest = 0
    original = inner.read_rows

    def read_rows(name: str, first: int, out: np.ndarray, dtype: Any) -> None:
        nonlocal largest
        largest = max(largest, out.nbytes)
        original(name, first, out, dtype)

    monkeypatch.setattr(inner, "read_rows", read_rows)
    QuantizeOnLoad(inner, 4).read_affine(name, 0, 20_000)
    assert 0 < largest <= 4 << 20


def test_what_is_quantized_already_stays_as_it_is(tmp_path: Path) -> None:
    inner = quantized_checkpoint(tiny_model("llama", 0), tmp_path, bits=5)
    checkpoint = QuantizeOnLoad(inner, 8)
    assert checkpoint.tensors == inner.tensors
    for name, (_, rows) in inner.affine.items():
        np.testing.assert_array_equal(checkpoint.read_affine(name, 0, len(rows.q)).dequantized(), inner.arrays[name])


def test_a_dense_view_gives_the_dequantized_numbers(tmp_path: Path) -> None:
    parts, exact = packed(16, 4, 64)
    checkpoint = DenseView(
        SafetensorsCheckpoint(write_mlx(tmp_path, {UP.format(0): parts}, {"bits": 4, "group_size": 64}))
    )
    name = UP.format(0) + ".weight"
    assert all(info.affine is None for info in checkpoint.tensors.values())
    out = np.empty(exact.shape, np.float32)
    checkpoint.read_into(name, out, "float32")
    np.testing.assert_array_equal(out, exact)
    with pytest.raises(ValueError, match="dense"):
        checkpoint.read_affine(name, 0, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, 1e6])
def test_numbers_that_cant_be_quantized_are_refused(tmp_path: Path, value: float) -> None:
    weight = torch.randn(16, 64)
    weight[5, 7], weight[5, 8] = value, -value
    folder = write_folder(tmp_path, {"model.layers.0.mlp.up_proj.weight": weight})
    checkpoint = QuantizeOnLoad(open_checkpoint(folder), 4)
    checkpoint.read_affine("model.layers.0.mlp.up_proj.weight", 0, 5)
    with pytest.raises(BadCheckpoint, match="not a number") as raised:
        checkpoint.read_affine("model.layers.0.mlp.up_proj.weight", 0, 16)
    assert "up_proj" in raised.value.message


def test_a_stage_reads_its_weights_in_the_form_it_is_told(tmp_path: Path) -> None:
    inner = memory_checkpoint(tiny_model("llama", 0), tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    assert in_weights_form(inner, "stored").tensors[name].affine is None
    assert in_weights_form(inner, "dense").tensors[name].affine is None
    for weights, bits in (("4-bit", 4), ("8-bit", 8)):
        form = in_weights_form(inner, weights).tensors[name].affine  # type: ignore[arg-type]
        assert form == AffineForm(bits=bits, group=64, exact=False)
    assert load_shard.__module__ == "shard.worker.load"


@pytest.mark.parametrize("freedom", [4, 1000])
def test_groups_of_32_would_be_worth_less_than_their_bytes(freedom: float) -> None:
    """The choice of 64: what 32 takes more, half a bit a weight, lowers the error by 2^0.5 where q is finer instead."""
    values = np.random.default_rng(0).standard_t(freedom, (256, 1024)).astype(np.float32)
    errors = {group: rms(quantize_rows(values, 4, group).dequantized() - values) / rms(values) for group in (32, 64)}
    print(f"relative rms error {errors[32]:.4f} in groups of 32, {errors[64]:.4f} of 64")
    assert errors[32] < errors[64] < 2**0.5 * errors[32]
