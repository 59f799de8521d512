"""Tiny GGUF files with known weights, written as llama.cpp's converter would write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType
from tokenizers.pre_tokenizers import ByteLevel

from shard.formats.gguf.checkpoint import GgufCheckpoint
from shard.formats.gguf.ingest import ingest_gguf

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 2, 64, 4, 2, 16, 96
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "he ll")
TOKENS = [*SPECIALS, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]


def weights(architecture: str = "llama", seed: int = 0) -> dict[str, np.ndarray]:
    """Hugging Face names → float32, in Hugging Face's order of rows."""
    draw = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (len(TOKENS), HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in _layer_shapes(architecture).items()}
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Write the file and return what a checkpoint should read from it, as float32. `metadata` overrides strings."""
    model = weights(architecture)
    writer = gguf.GGUFWriter(path, architecture)
    _write_metadata(writer, metadata or {})
    expected = {}
    for name, values in model.items():
        if name in drop:
            continue
        stored = _as_converter(architecture, name, values)
        if values.ndim == 2 and values.shape[-1] % 32 == 0 and kind != GGMLQuantizationType.F32:
            packed = gguf.quants.quantize(stored, kind)
            writer.add_tensor(_gguf_name(architecture, name), packed, raw_dtype=kind)
            expected[name] = _undo_converter(architecture, name, gguf.quants.dequantize(packed, kind))
        else:
            writer.add_tensor(_gguf_name(architecture, name), stored)
            expected[name] = _undo_converter(architecture, name, stored)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's converter on Q and K: the two halves of each head's rows interleaved."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _layer_shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    if architecture in ("qwen3", "gemma3"):
        shapes |= {"self_attn.q_norm": (HEAD_DIM,), "self_attn.k_norm": (HEAD_DIM,)}
    if architecture == "gemma3":
        shapes |= {"pre_feedforward_layernorm": (HIDDEN,), "post_feedforward_layernorm": (HIDDEN,)}
    return shapes


def _heads_of(architecture: str, name: str) -> int | None:
    if architecture != "llama":
        return None
    return HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None


def _as_converter(architecture: str, name: str, values: np.ndarray) -> np.ndarray:
    heads = _heads_of(architecture, name)
    if heads is not None:
        return permute(values, heads)
    return values + np.float32(1) if architecture == "gemma3" and name.endswith("norm.weight") else values


def _undo_converter(architecture: str, name: str, values: np.ndarray) -> np.ndarray:
    heads = _heads_of(architecture, name)
    if heads is not None:
        index = np.argsort(permute(np.arange(len(values)), heads))
        return values[index]
    return values - np.float32(1) if architecture == "gemma3" and name.endswith("norm.weight") else values


def _gguf_name(architecture: str, name: str) -> str:
    enum = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3, "gemma3": gguf.MODEL_ARCH.GEMMA3}[
        architecture
    ]
    known = gguf.get_tensor_name_map(enum, LAYERS).get_name(name, try_suffixes=(".weight", ".bias"))
    assert known is not None
    return str(known)


def _write_metadata(writer: gguf.GGUFWriter, overrides: dict[str, Any]) -> None:
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_sliding_window(32)
    writer.add_tokenizer_model(overrides.get("model", "gpt2"))
    writer.add_tokenizer_pre(overrides.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)))
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if "scaling" in overrides:
        writer.add_rope_scaling_type(overrides["scaling"])
    if "experts" in overrides:
        writer.add_expert_count(overrides["experts"])


def ingested(file: Path, folder: Path) -> GgufCheckpoint:
    folder.mkdir(exist_ok=True)
    ingest_gguf(file, folder, recorded_as=str(file))
    return GgufCheckpoint(folder)
