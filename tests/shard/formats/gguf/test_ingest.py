"""GGUF files: what is read is what the gguf package reads, in Hugging Face's order, and no file can mislead us."""

from __future__ import annotations

import contextlib
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from shard.formats.gguf.header import read_header
from shard.formats.gguf.ingest import llama3_factors
from shard.formats.gguf.quants import dequantize_rows
from shard.pieces.open import open_checkpoint
from tests.support.shard.tiny_gguf import HEAD_DIM, ingested, permute, write_gguf
from transport.errors import BadCheckpoint, PotluckError, UnsupportedModel

INGEST_LIMIT_S = 10.0
OPEN_LIMIT_S = 1.0
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_every_format_is_dequantized_as_gguf_does(kind: str) -> None:
    qtype = GGMLQuantizationType[kind]
    block, block_bytes = GGML_QUANT_SIZES[qtype]
    draw = np.random.default_rng(1)
    # Random bits, infinities and NaN among them: corrupt scales must not come out differently either.
    data = draw.integers(0, 256, (33, 512 // block * block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, qtype)
    np.testing.assert_array_equal(dequantize_rows(data, kind).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_weights_come_back_in_hugging_faces_order(tmp_path: Path, architecture: str, kind: str) -> None:
    expected = write_gguf(tmp_path / "m.gguf", architecture, kind=GGMLQuantizationType[kind])
    checkpoint = ingested(tmp_path / "m.gguf", tmp_path / "index")
    assert set(checkpoint.tensors) == set(expected)
    for name, values in expected.items():
        out = np.empty(values.shape, np.float32)
        checkpoint.read_into(name, out, "float32")
        np.testing.assert_array_equal(out, values, err_msg=name)


def test_smollm2_is_gguf_dequantized_and_rounded_to_nearest(smollm2_path: Path) -> None:
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_path / SMOLLM2).tensors}
    checkpoint = open_checkpoint(smollm2_path)
    pairs = {
        "model.embed_tokens.weight": ("token_embd.weight", None),
        "model.norm.weight": ("output_norm.weight", None),
        "model.layers.7.self_attn.q_proj.weight": ("blk.7.attn_q.weight", 9),
        "model.layers.7.self_attn.k_proj.weight": ("blk.7.attn_k.weight", 3),
        "model.layers.29.mlp.down_proj.weight": ("blk.29.ffn_down.weight", None),
    }
    for name, (original, heads) in pairs.items():
        expected = gguf.quants.dequantize(reader[original].data, reader[original].tensor_type)
        exact = np.empty(checkpoint.tensors[name].shape, np.float32)
        checkpoint.read_into(name, exact, "float32")
        np.testing.assert_array_equal(permute(exact, heads) if heads else exact, expected, err_msg=name)
        bits = np.empty(exact.shape, np.uint16)
        checkpoint.read_into(name, bits, "bfloat16")
        assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16), torch.from_numpy(exact).to(torch.bfloat16))
        halves = np.empty(exact.shape, np.float16)
        checkpoint.read_into(name, halves, "float16")
        assert torch.equal(torch.from_numpy(halves), torch.from_numpy(exact).to(torch.float16))


def test_ingest_and_open_are_fast(smollm2_path: Path, tmp_path: Path) -> None:
    start = time.perf_counter()
    ingested(smollm2_path / SMOLLM2, tmp_path / "index").close()
    ingest_s = time.perf_counter() - start
    start = time.perf_counter()
    spec = open_checkpoint(tmp_path / "index").spec
    open_s = time.perf_counter() - start
    print(f"ingest {ingest_s:.2f} s, open {open_s * 1e3:.1f} ms")
    assert ingest_s < INGEST_LIMIT_S
    assert open_s < OPEN_LIMIT_S
    assert (spec.num_layers, spec.hidden_size, spec.stored_dtype) == (30, 576, "Q4_1")
    assert sum(spec.layer_params) + spec.embed_params + spec.norm_params == 134_515_008


def test_llama3_rope_factors_become_rope_scaling(tmp_path: Path) -> None:
    factors = llama3_factors(10000.0, HEAD_DIM, 32.0).astype(np.float32)
    assert factors.max() > 1
    write_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": factors})
    scaling = ingested(tmp_path / "m.gguf", tmp_path / "index").config["rope_scaling"]
    assert scaling["rope_type"] == "llama3"
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.from_pretrained(tmp_path / "index")
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    np.testing.assert_allclose(inverse.numpy(), plain / factors, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metadata": {"pre": "unheard-of"}}, "unheard-of"),
        ({"metadata": {"model": "rwkv"}}, "rwkv"),
        ({"metadata": {"scaling": gguf.RopeScalingType.YARN}}, "yarn"),
        ({"metadata": {"experts": 8}}, "mixture of experts"),
        ({"extra": {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}}, "rotary factors"),
        ({"extra": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}}, "attn_sinks"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "biases"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, options: dict[str, object], words: str) -> None:
    write_gguf(tmp_path / "m.gguf", **options)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match=words) as raised:
        ingested(tmp_path / "m.gguf", tmp_path / "index")
    assert raised.value.hint


def test_an_unsupported_architecture_is_named_with_the_supported_ones(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match="mamba") as raised:
        ingested(tmp_path / "m.gguf", tmp_path / "index")
    assert "gemma2, gemma3, llama, qwen2, qwen3" in raised.value.hint


def test_a_missing_tensor_is_found_at_ingest(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", drop=("model.layers.1.mlp.up_proj.weight",))
    with pytest.raises(BadCheckpoint, match=r"layer 1 has no mlp\.up_proj"):
        ingested(tmp_path / "m.gguf", tmp_path / "index")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 7, 20, 30, 100, 1000, 5000, len(whole) // 2, len(whole) - 40]:
        cut.write_bytes(whole[:length])
        with pytest.raises(BadCheckpoint, match=r"cut\.gguf"):
            read_header(cut)


def test_any_flipped_byte_of_the_header_is_survived(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    whole = bytearray((tmp_path / "m.gguf").read_bytes())
    draw = np.random.default_rng(2)
    bad = tmp_path / "bad.gguf"
    for position in [*range(4, 200), *draw.integers(200, 9000, 200).tolist()]:
        original = whole[position]
        whole[position] ^= int(draw.integers(1, 256))
        bad.write_bytes(whole)
        whole[position] = original
        with contextlib.suppress(PotluckError):
            ingested(bad, tmp_path / "index").close()


@pytest.mark.parametrize("count", [1 << 20, 1 << 40, (1 << 64) - 1])
def test_absurd_counts_are_refused_without_allocating(tmp_path: Path, count: int) -> None:
    file = tmp_path / "absurd.gguf"
    huge_list = b"\x01\0\0\0\0\0\0\0k" + struct.pack("<IIQ", 9, 4, count)
    for body in (
        struct.pack("<QQ", count, 0),
        struct.pack("<QQ", 0, count),
        struct.pack("<QQQ", 0, 1, count),
        struct.pack("<QQ", 0, 1) + huge_list,
    ):
        file.write_bytes(b"GGUF" + struct.pack("<I", 3) + body + bytes(64))
        with pytest.raises(BadCheckpoint, match=r"absurd\.gguf"):
            read_header(file)


def test_a_file_that_changed_or_went_is_told(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    checkpoint = ingested(tmp_path / "m.gguf", tmp_path / "index")
    with (tmp_path / "m.gguf").open("r+b") as file:
        file.truncate(10_000)
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(BadCheckpoint, match="cut off"):
        checkpoint.read_into(name, np.empty(checkpoint.tensors[name].shape, np.float32), "float32")
    with pytest.raises(BadCheckpoint, match="when it was pulled"):
        open_checkpoint(tmp_path / "index")
    (tmp_path / "m.gguf").unlink()
    with pytest.raises(BadCheckpoint, match="can't open"):
        open_checkpoint(tmp_path / "index")
