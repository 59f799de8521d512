"""Quantized checkpoints on MLX: packed exactly, the logits of the dequantized model, in the packed weights' memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx
import torch
import transformers
from mlx import nn
from mlx.utils import tree_flatten

from shard.formats.affine import AFFINE_BITS, AFFINE_GROUPS, AffineForm, AffineRows, quantize_rows
from shard.mlx_backend.build import build_mlx_shard
from shard.mlx_backend.shard import CHUNK_TOKENS, CpuLinear, MlxShard
from shard.mlx_backend.weights import AffineParameter, Progress, pack, packed_words
from shard.stage import Batch
from tests.support.shard import tiny
from tests.support.shard.mlx_load_peak import LARGEST_BYTES
from tests.support.shard.mlx_quantized_peak import PACKED_BYTES
from tests.support.shard.mlx_ring import Ring, error, shard_spec
from tests.support.shard.stage_runner import logits_by_position, random_prompts, random_steps
from transport.errors import UnsupportedModel
from transport.messages.ring import DType, Entry, SequenceId

FAMILIES = (*tiny.CORE_FAMILIES, "smollm3", "olmo2", "phi3")
TOLERANCE = 1e-4
NEAR_TIE = 1e-5
LENGTHS = (37, 21, 9)


def dequantized_model(family: str, folder: Path, bits: int, group: int) -> tuple[Any, tiny.MemoryCheckpoint]:
    """A quantized checkpoint whose routers have no near-tie on `prompts()`, and transformers' model of its numbers."""
    for seed in range(8):
        checkpoint = tiny.quantized_checkpoint(tiny.tiny_model(family, seed), folder, bits, group)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        if min(tiny.router_gap(model, ids) for ids in random_prompts(0, LENGTHS).values()) >= NEAR_TIE:
            return model, checkpoint
    raise AssertionError(f"no seed of {family} without a near-tie")


def arrays_of(shard: MlxShard) -> list[mx.array]:
    modules = shard._modules
    held = [*modules.layers, *(end for end in (modules.embed, modules.norm, modules.lm_head) if end is not None)]
    return [array for module in held for array in dict(tree_flatten(module.parameters())).values()]


def progress_into(seen: list[tuple[int, int]]) -> Progress:
    return lambda done, total: seen.append((done, total))


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 32), (8, 64)])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_split_gives_the_logits_of_the_dequantized_model(
    family: str, bits: int, group: int, tmp_path: Path
) -> None:
    model, checkpoint = dequantized_model(family, tmp_path, bits, group)
    prompts = random_prompts(0, LENGTHS)
    wanted = {sequence: tiny.reference_logits(model, ids) for sequence, ids in prompts.items()}
    for cuts in ((), (2,), (1, 3)):
        rows = logits_by_position(Ring(checkpoint, cuts).shards, random_steps(len(cuts), prompts))
        for sequence, reference in wanted.items():
            positions = [position for held, position in rows if held == sequence]
            got = np.stack([rows[sequence, position] for position in positions])
            assert error(got, reference[positions]) <= TOLERANCE, f"cut at {cuts}"


def test_every_tensor_keeps_its_own_form(tmp_path: Path) -> None:
    """Bits and groups mixed within a layer, an embedding and a head apart, dense ones among them."""
    _, checkpoint = dequantized_model("llama", tmp_path, 4, 32)
    for i, name in enumerate(sorted(checkpoint.affine)):
        form = AffineForm(bits=AFFINE_BITS[i % len(AFFINE_BITS)], group=AFFINE_GROUPS[i % 2])
        if checkpoint.arrays[name].shape[-1] % form.group or i % 5 == 4:
            del checkpoint.affine[name]
            continue
        rows = quantize_rows(checkpoint.arrays[name], form.bits, form.group)
        checkpoint.affine[name] = (form, rows)
        checkpoint.arrays[name] = rows.dequantized()
    assert {form.bits for form, _ in checkpoint.affine.values()} == set(AFFINE_BITS)
    dense = replace(checkpoint, affine={})
    ids = list(range(3, 40))
    assert error(Ring(checkpoint, (2,)).step((1, 0, ids)), Ring(dense).step((1, 0, ids))) <= TOLERANCE


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.03), ("bfloat16", 0.2)])
@pytest.mark.parametrize("family", ["llama_tied", "phi3"])
def test_half_precision_stays_close(family: str, dtype: DType, tolerance: float, tmp_path: Path) -> None:
    """Metal's way: scales, biases and hidden states in 16 bits. The CPU build also accumulates in them: coarser."""
    model, checkpoint = dequantized_model(family, tmp_path, 4, 32)
    ids = random_prompts(0, LENGTHS)[SequenceId(1)]
    ring = Ring(checkpoint, (2,), dtype=dtype, wire=dtype)
    assert error(ring.step((1, 0, ids)), tiny.reference_logits(model, ids)) <= tolerance


@pytest.mark.parametrize("group", AFFINE_GROUPS)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_what_is_packed_is_what_mlx_reads(bits: int, group: int) -> None:
    """Bit for bit: our packing, read by MLX, gives the rows' numbers; and mx.quantize packs alike."""
    rng = np.random.default_rng(bits)
    rows = AffineRows(
        q=rng.integers(0, 1 << bits, (33, 384), dtype=np.uint8),
        scales=rng.standard_normal((33, 384 // group)).astype(np.float32),
        biases=rng.standard_normal((33, 384 // group)).astype(np.float32),
    )
    words = np.empty((33, packed_words(384, bits)), np.uint32)
    pack(rows.q, bits, words)
    got = mx.dequantize(mx.array(words), mx.array(rows.scales), mx.array(rows.biases), group, bits, stream=mx.cpu)
    assert np.array_equal(np.array(got), rows.dequantized())
    # Integers that reach from 0 to the largest in every group are what mx.quantize leaves as they are.
    whole = rows.q.copy()
    whole[:, ::group], whole[:, 1::group] = 0, (1 << bits) - 1
    theirs, scales, _ = mx.quantize(mx.array(whole.astype(np.float32)), group, bits, stream=mx.cpu)
    q = np.where(np.repeat(np.array(scales) > 0, group, axis=1), whole, (1 << bits) - 1 - whole)
    pack(q.astype(np.uint8), bits, words)
    assert np.array_equal(np.array(theirs), words)


def test_a_tensor_is_read_in_pieces_each_in_its_place(tmp_path: Path) -> None:
    """Larger than a piece, from several threads, into one of several experts; the file's bytes are counted once."""
    rows = quantize_rows(np.random.default_rng(0).standard_normal((5000, 1024)).astype(np.float32), 5, 64)
    checkpoint = tiny.memory_checkpoint(tiny.tiny_model("llama", 0), tmp_path)
    checkpoint.arrays["expert"] = rows.dequantized()
    checkpoint.affine["expert"] = (AffineForm(bits=5, group=64), rows)
    parameter = AffineParameter((2, 5000, 1024), AffineForm(bits=5, group=64), "float32")
    noted: list[int] = []
    parameter.read(checkpoint, "expert", (1,), noted.append)
    held = parameter.arrays()
    got = mx.dequantize(held["weight"], held["scales"], held["biases"], 64, 5, stream=mx.cpu)
    assert np.array_equal(np.array(got[1]), checkpoint.arrays["expert"])
    assert not np.array(got[0]).any()
    assert len(noted) > 1
    assert sum(noted) == checkpoint.tensors["expert"].file_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "phi3", "mixtral"])
def test_weights_bytes_are_what_the_arrays_hold(family: str, dtype: DType, tmp_path: Path) -> None:
    checkpoint = tiny.quantized_checkpoint(tiny.tiny_model(family, 0), tmp_path)
    width = 4 if dtype == "float32" else 2
    for first, last in ((0, 2), (1, 3), (2, 4), (0, 4)):
        seen: list[tuple[int, int]] = []
        shard = build_mlx_shard(checkpoint, shard_spec(first, last, dtype=dtype), progress_into(seen))
        arrays = arrays_of(shard)
        assert shard.weights_bytes == sum(array.nbytes for array in arrays)
        ends = ("model.embed_tokens.",) if first == 0 else ()
        if last == tiny.NUM_LAYERS:
            ends += ("model.norm.", "lm_head.", *(("model.embed_tokens.",) if family.endswith("tied") else ()))
        own = (*(f"model.layers.{i}." for i in range(first, last)), *ends)
        infos = [info for name, info in checkpoint.tensors.items() if name.startswith(own)]
        wanted = 0
        for info in infos:
            size = int(np.prod(info.shape))
            form = info.affine
            wanted += size * width if form is None else size * form.bits // 8 + 2 * width * size // form.group
        assert shard.weights_bytes == wanted
        assert seen[-1] == (seen[-1][1], sum(info.file_bytes for info in infos))


def test_loading_holds_no_dense_copy() -> None:
    """A process that loads a 4-bit stage grows by its packed weights, and less than a tensor of float32 besides."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.shard.mlx_quantized_peak"],
        capture_output=True,
        text=True,
        timeout=400,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["weights_bytes"] == PACKED_BYTES
    assert found["grown_bytes"] <= PACKED_BYTES + 0.75 * LARGEST_BYTES


@pytest.mark.parametrize("form", [AffineForm(bits=4, group=16), AffineForm(bits=7, group=32)])
def test_a_form_without_kernels_is_refused_by_name(form: AffineForm, tmp_path: Path) -> None:
    checkpoint = tiny.quantized_checkpoint(tiny.tiny_model("llama", 0), tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    checkpoint.affine[name] = (form, quantize_rows(checkpoint.arrays[name], form.bits, form.group))
    with pytest.raises(UnsupportedModel, match=f"mlx:cpu.*{name}.*{form.bits} bits in groups of {form.group}.*128"):
        build_mlx_shard(checkpoint, shard_spec(0, 4))
    build_mlx_shard(checkpoint, shard_spec(2, 4))


def test_experts_quantized_differently_are_refused_by_name(tmp_path: Path) -> None:
    checkpoint = tiny.quantized_checkpoint(tiny.tiny_model("qwen3_moe", 0), tmp_path)
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    checkpoint.affine[name] = (AffineForm(bits=8, group=32), quantize_rows(checkpoint.arrays[name], 8, 32))
    with pytest.raises(UnsupportedModel, match=name):
        build_mlx_shard(checkpoint, shard_spec(0, 4))
    del checkpoint.affine[name]
    with pytest.raises(UnsupportedModel, match="dense"):
        build_mlx_shard(checkpoint, shard_spec(0, 4))


@pytest.mark.parametrize("last", [2, 4])
def test_a_step_is_evaluated_once(last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny.quantized_checkpoint(tiny.tiny_model("qwen3_moe", 0), tmp_path)
    shard = build_mlx_shard(checkpoint, shard_spec(0, last))
    calls: list[int] = []
    evaluate = mx.eval

    def counted(*arrays: Any) -> None:
        calls.append(1)
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", counted)
    entries = (Entry(SequenceId(1), 0, tuple(range(3, 20)), 1), Entry(SequenceId(2), 0, (5,), 1))
    shard.forward(Batch(entries=entries, hidden=None))
    assert calls == [1]


@pytest.mark.parametrize("num_tokens", [1, CHUNK_TOKENS - 1, CHUNK_TOKENS, 3 * CHUNK_TOKENS])
def test_a_chunk_of_any_length_gives_the_product(num_tokens: int) -> None:
    """The CPU build's way with chunks, over several tiles, with a bias, against the dense product."""
    rng = np.random.default_rng(num_tokens)
    weight = rng.standard_normal((600, 1024)).astype(np.float32)
    x = rng.standard_normal((1, num_tokens, 1024)).astype(np.float32)
    module = nn.QuantizedLinear(1024, 600, True, 64, 4)  # type: ignore[attr-defined]
    module.weight, module.scales, module.biases = mx.quantize(mx.array(weight), 64, 4)
    module.bias = mx.arange(600, dtype=mx.float32)
    dense = np.array(mx.dequantize(module.weight, module.scales, module.biases, 64, 4))
    got = np.array(CpuLinear(module)(mx.array(x)))
    assert error(got, x @ dense.T + np.arange(600, dtype=np.float32)) <= 1e-5


def test_a_chunk_is_the_same_whoever_else_is_in_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, and so is a decode: their kinds choose the kernels, also beside a chunk's worth of decodes."""
    checkpoint = tiny.quantized_checkpoint(tiny.tiny_model("llama", 0), tmp_path)
    ids = list(range(3, 3 + 2 * CHUNK_TOKENS))
    decodes = [(2 + i, 0, ids[i : i + 1]) for i in range(CHUNK_TOKENS)]
    chunk = (1, 0, ids)
    by_tiles: list[int] = []
    multiply = CpuLinear._chunk

    def noted(self: CpuLinear, x: mx.array) -> mx.array:
        by_tiles.append(x.shape[0])
        return multiply(self, x)

    monkeypatch.setattr(CpuLinear, "_chunk", noted)
    chunk_alone, decode_alone = Ring(checkpoint, (2,)).step(chunk), Ring(checkpoint, (2,)).step(decodes[0])
    together = Ring(checkpoint, (2,)).step(*decodes, chunk)
    assert np.array_equal(together[CHUNK_TOKENS:], chunk_alone)
    assert np.array_equal(together[:1], decode_alone)
    assert set(by_tiles) == {len(ids)}
