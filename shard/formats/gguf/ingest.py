"""Ingesting parses a .gguf once into a folder that opens at once; the weights stay in the file.

First, its metadata and tensor names become a Hugging Face config.json and names.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shard.formats.checkpoint import TensorInfo
from shard.formats.config import spec_from
from shard.formats.families import GGUF_FAMILIES, Family, GgufFacts, family_of
from shard.formats.gguf.header import GgufHeader, GgufTensor, Progress, read_header
from shard.formats.gguf.index import INDEX_VERSION, GgufIndex, IndexedTensor, write_index
from shard.formats.gguf.quants import check_format, dequantize_rows
from shard.formats.gguf.tokenizer import write_tokenizer
from shard.formats.weight_folder import read_exactly
from transport.errors import BadCheckpoint, UnsupportedModel

ROPE_FACTORS = "rope_freqs.weight"

_MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def family_of_gguf(architecture: object) -> Family:
    """Raises UnsupportedModel for an architecture that can't be read from a GGUF."""
    family = GGUF_FAMILIES.get(str(architecture))
    if family is None:
        raise UnsupportedModel(
            f"GGUF files of the architecture {architecture!r} are not supported",
            hint=f"supported are {', '.join(GGUF_FAMILIES)}; other models work from a Hugging Face folder",
        )
    return family


def hugging_face_name(family: Family, name: str) -> str:
    """The name transformers gives the tensor. Raises UnsupportedModel for one that it has no place for."""
    if name in _MODEL_TENSORS:
        return _MODEL_TENSORS[name]
    norms = family.norms
    layers: dict[str, str | None] = {
        **_LAYER_TENSORS,
        "attn_norm": norms.before_attention,
        "post_attention_norm": norms.after_attention,
        "ffn_norm": norms.before_mlp,
        "post_ffw_norm": norms.after_mlp,
    }
    match = _LAYER_NAME.fullmatch(name)
    found = None if match is None else layers.get(match[2])
    if match is None or found is None:
        raise UnsupportedModel(
            f"the GGUF's tensor {name!r} has no place in {family.model_type} as it is known here",
            hint="it may be a variant (a mixture of experts, an adapter); use the model's Hugging Face folder",
        )
    return f"model.layers.{match[1]}.{found}.{match[3]}"


# Every Llama 3.1 to 3.3: the factors in the file do not say these, but they are recomputed and compared.
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, _TRAINED_TOKENS = 1.0, 4.0, 8192


def rope_scaling(
    field: Callable[[str], Any], theta: float, head_dim: int, factors: np.ndarray | None
) -> dict[str, Any] | None:
    """`factors` [head_dim / 2] divide the frequencies. Raises UnsupportedModel for what can't be said exactly."""
    kind = field("rope.scaling.type")
    if factors is not None:
        return _llama3(theta, head_dim, factors)
    if kind in (None, "none"):
        return None
    factor = field("rope.scaling.factor")
    if kind == "linear" and isinstance(factor, float) and factor > 0:
        return {"rope_type": "linear", "factor": factor}
    raise UnsupportedModel(
        f"a rotary embedding scaled by {kind!r} can't be read from a GGUF", hint="use the model's Hugging Face folder"
    )


def llama3_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """float64 [head_dim / 2], as transformers' `_compute_llama3_parameters` divides the frequencies."""
    inverse = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelength = 2 * math.pi / inverse
    smooth = (_TRAINED_TOKENS / wavelength - _LOW_FREQ_FACTOR) / (_HIGH_FREQ_FACTOR - _LOW_FREQ_FACTOR)
    between = 1 / ((1 - smooth) / factor + smooth)
    low = wavelength > _TRAINED_TOKENS / _LOW_FREQ_FACTOR
    high = wavelength < _TRAINED_TOKENS / _HIGH_FREQ_FACTOR
    return np.where(low, factor, np.where(high, 1.0, between))


def _llama3(theta: float, head_dim: int, factors: np.ndarray) -> dict[str, Any] | None:
    if (factors == 1).all():
        return None
    factor = float(factors.max())
    expected = llama3_factors(theta, head_dim, factor)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise UnsupportedModel(
            "the GGUF's rotary factors (rope_freqs.weight) are not those of Llama 3",
            hint="use the model's Hugging Face folder",
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW_FREQ_FACTOR,
        "high_freq_factor": _HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": _TRAINED_TOKENS,
    }


_LOCAL_THETA = 10_000.0  # llama.cpp's own constant for files that do not say.


class MetadataFields:
    """The architecture's own metadata, `llama.block_count` and the like, checked as it is read."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._metadata = metadata
        self._architecture = architecture

    def get(self, key: str) -> Any:
        return self._metadata.get(f"{self._architecture}.{key}")

    def positive_int(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # One number per layer, all the same.
        if value is None:
            value = default
        if isinstance(value, np.ndarray):
            raise UnsupportedModel(
                f"the GGUF's {self._architecture}.{key} differs from layer to layer", hint="use a uniform model"
            )
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 31:
            raise BadCheckpoint(f"the GGUF has {self._architecture}.{key} = {value!r}", hint="download it again")
        return value

    def positive_float(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise BadCheckpoint(f"the GGUF has {self._architecture}.{key} = {value!r}", hint="download it again")
        # The shortest decimal that float32 can't tell apart: 1e-05, where the file's bits read as 9.99999974e-06.
        return float(str(np.float32(value)))


def config_from(header: GgufHeader, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """`rope_factors` is the tensor rope_freqs.weight, float32, where the file has it. Raises UnsupportedModel."""
    family = family_of_gguf(header.metadata.get("general.architecture"))
    assert family.gguf is not None
    fields = MetadataFields(header.metadata, family.gguf.architecture)
    if header.metadata.get("split.count", 0) > 1:
        raise UnsupportedModel(
            "the GGUF is one of several parts", hint="join them first: llama-gguf-split --merge FIRST_PART OUTPUT"
        )
    if fields.get("expert_count"):
        raise UnsupportedModel(
            "a mixture of experts can't be read from a GGUF yet", hint="use the model's Hugging Face folder"
        )
    names = {tensor.name: tensor for tensor in header.tensors}
    if "token_embd.weight" not in names:
        raise BadCheckpoint("the GGUF has no token_embd.weight", hint="it is no language model, or was split in parts")
    hidden = fields.positive_int("embedding_length")
    heads = fields.positive_int("attention.head_count")
    head_dim = fields.positive_int("attention.key_length", hidden // heads)
    if fields.positive_int("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel("keys and values of different sizes are not supported", hint="use another model")
    theta = fields.positive_float("rope.freq_base", 10_000.0)
    config: dict[str, Any] = {
        "architectures": [family.gguf.hf_class],
        "model_type": family.model_type,
        "vocab_size": names["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": fields.positive_int("feed_forward_length"),
        "num_hidden_layers": fields.positive_int("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.positive_int("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.positive_int("context_length"),
        "rms_norm_eps": fields.positive_float("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": rope_scaling(fields.get, theta, head_dim, rope_factors),
        "tie_word_embeddings": "output.weight" not in names,
        "torch_dtype": "bfloat16",
    }
    if fields.positive_int("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModel(
            "a rotary embedding of only a part of each head is not supported", hint="use another model"
        )
    return config | _family_config(family, family.gguf, fields, config, names.keys()) | _token_ids(header.metadata)


def _family_config(
    family: Family, facts: GgufFacts, fields: MetadataFields, config: dict[str, Any], names: Any
) -> dict[str, Any]:
    if facts.large_layers is not None:
        return _gemma_config(family, facts, fields, config)
    attention_biases = {part for part in ("q", "k", "v", "output") if f"blk.0.attn_{part}.bias" in names}
    if facts.attention_biases is None:
        return {
            "hidden_act": family.activation,
            "attention_bias": _all_or_none(attention_biases, 4, "attention"),
            "mlp_bias": _all_or_none({p for p in ("gate", "up", "down") if f"blk.0.ffn_{p}.bias" in names}, 3, "MLP"),
        }
    if attention_biases != facts.attention_biases:
        raise UnsupportedModel(
            f"this {facts.architecture} has biases in attention where it should not", hint="use its Hugging Face folder"
        )
    return {"hidden_act": family.activation, "attention_bias": False, "use_sliding_window": False}


def _all_or_none(found: set[str], expected: int, where: str) -> bool:
    if found and len(found) != expected:
        raise UnsupportedModel(f"biases in only some of the {where}'s projections: {found}", hint="use another model")
    return bool(found)


def _gemma_config(family: Family, facts: GgufFacts, fields: MetadataFields, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    scalar = config["head_dim"]
    if layers == facts.large_layers:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    pattern = family.window_pattern
    if fields.get("attention.sliding_window_pattern") is not None:
        pattern = fields.positive_int("attention.sliding_window_pattern")
    gemma = {
        "hidden_activation": family.activation,
        "query_pre_attn_scalar": scalar,
        "sliding_window": fields.positive_int("attention.sliding_window", facts.default_window),
        "layer_types": [
            "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)
        ],
    }
    if family.caps_attention:
        return gemma | {
            "attn_logit_softcapping": fields.positive_float("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": fields.positive_float("final_logit_softcapping", 30.0),
        }
    if fields.get("final_logit_softcapping"):
        raise UnsupportedModel(
            f"this {facts.architecture} caps its logits, which is not supported", hint="use its Hugging Face folder"
        )
    return gemma | {
        "sliding_window_pattern": pattern,
        "rope_local_base_freq": fields.positive_float("rope.freq_base_swa", _LOCAL_THETA),
    }


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The ids that a file names; those that it does not name are None, never transformers' defaults."""
    named = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in named.items()}


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
