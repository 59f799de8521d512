"""A Hugging Face config.json and the tensors' shapes become a ModelSpec, or a refusal that names the feature."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shard.formats.checkpoint import TensorInfo, weight_block
from shard.formats.families import Family, family_of, has_stacked_experts
from shard.formats.spec import ModelSpec, ModelWeights, WeightBlock, merge_blocks
from transport.errors import BadCheckpoint, UnsupportedModel


def layer_windows(config: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer in tokens, None for full attention."""
    family = family_of(config)
    kinds = _layer_kinds(config, family, num_layers)
    if "sliding_attention" not in kinds or (family.optional_window and not config.get("use_sliding_window")):
        return (None,) * num_layers
    window = family.window(config)
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise BadCheckpoint(
            f"config.json has sliding layers and sliding_window = {window!r}",
            hint="take the config.json of the model's own repository",
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _layer_kinds(config: dict[str, Any], family: Family, num_layers: int) -> list[str]:
    kinds = config.get("layer_types")
    if kinds is None:
        slide = _sliding_layers(config, family, num_layers)
        return ["sliding_attention" if layer in slide else "full_attention" for layer in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise BadCheckpoint(
            f"config.json's layer_types is not a list of {num_layers} kinds", hint="download the config again"
        )
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(
                f"config.json has layers of the kind {kind!r}",
                hint="layers with full or sliding-window attention are supported",
            )
    return kinds


def _sliding_layers(config: dict[str, Any], family: Family, num_layers: int) -> set[int]:
    layers = range(num_layers)
    if family.slides == "all_but_every_nth":
        pattern = family.window_pattern
        if family.pattern_key:
            pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", pattern))
        if not isinstance(pattern, int) or pattern < 1:
            raise BadCheckpoint(f"config.json has sliding_window_pattern = {pattern!r}", hint="download it again")
        return {layer for layer in layers if (layer + 1) % pattern}
    if family.slides == "never" or not family.window(config):
        return set()
    if family.slides == "from_max_window_layers":
        return set(layers[config.get("max_window_layers", 28) :])
    if family.slides == "layers_without_rope":
        interval = config.get("no_rope_layer_interval", 4)
        has_rope = config.get("no_rope_layers") or [(layer + 1) % interval != 0 for layer in layers]
        return {layer for layer, rope in zip(layers, has_rope, strict=False) if not rope}
    return set(layers)


EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_DECODER = re.compile(r"(?:model\.(?:layers\.\d+|embed_tokens|norm)|lm_head)\.")
_MAX_LAYERS = 4096

# State that is not 2 · kv_heads · head_dim per token and layer, or that layers share: sizes and cuts would be wrong.
_UNSUPPORTED_KEYS = {
    "kv_lora_rank": "a compressed KV cache (multi-head latent attention)",
    "num_kv_shared_layers": "layers that share their KV cache",
    "ssm_state_size": "a recurrent state",
    "mamba_d_state": "a recurrent state",
    "attention_chunk_size": "chunked attention",
    "is_encoder_decoder": "an encoder",
}


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises BadCheckpoint."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadCheckpoint(
            f"can't read {path}: {error.strerror}", hint="a model's folder has a config.json and *.safetensors files"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} is not JSON: {error}", hint="download it again") from error
    if not isinstance(config, dict):
        raise BadCheckpoint(f"{path} is not a JSON object", hint="download it again")
    return config


def spec_from(config: dict[str, Any], tensors: Mapping[str, TensorInfo], *, file_bytes: int) -> ModelSpec:
    """What the config says, checked against the tensors' shapes. `architecture` is the config's `model_type`.

    Raises UnsupportedModel for what can't be split or sized, BadCheckpoint where config and tensors disagree.
    """
    check_supported(config)
    family = family_of(config)
    num_layers = _positive_int(config, "num_hidden_layers", at_most=_MAX_LAYERS)
    hidden = _positive_int(config, "hidden_size")
    _positive_int(config, "num_attention_heads")  # What a default is divided by.
    kv_heads = _positive_int(config, "num_key_value_heads", default=family.kv_heads(config))
    head_dim = _positive_int(config, "head_dim", default=family.head_dim(config))
    embed = _tensor(tensors, EMBEDDING, columns=hidden)
    tied = config.get("tie_word_embeddings")
    if tied is None:
        tied = family.tied_by_default or LM_HEAD not in tensors
    lm_head = embed if tied else _tensor(tensors, LM_HEAD, columns=hidden)
    norm = _tensor(tensors, NORM, columns=hidden)
    layers = _layer_blocks(tensors, num_layers)
    return ModelSpec(
        architecture=family.model_type,
        num_layers=num_layers,
        hidden_size=hidden,
        vocab_size=embed.shape[0],
        context_tokens=_positive_int(config, "max_position_embeddings"),
        tied_embeddings=bool(tied),
        layer_params=tuple(sum(block.elements for block in blocks) for blocks in layers),
        embed_params=math.prod(embed.shape),
        norm_params=math.prod(norm.shape),
        head_params=math.prod(lm_head.shape),
        kv_elements_per_token=(2 * kv_heads * head_dim,) * num_layers,
        windows=layer_windows(config, num_layers),
        legal_cuts=tuple(range(1, num_layers)),
        stored_dtype=_main_format(tensors),
        file_bytes=file_bytes,
        weights=ModelWeights(
            layers=tuple(map(merge_blocks, layers)),
            embed=(weight_block(embed),),
            norm=(weight_block(norm),),
            head=(weight_block(lm_head),),
        ),
        stacked_experts=has_stacked_experts(tensors),
        head_dim=head_dim,
    )


def model_part(name: str, spec: ModelSpec) -> str | None:
    """ "layers", "embed", "norm" or "head": the part of the model that a tensor belongs to. None: no stage loads it."""
    match = _LAYER.match(name)
    if match is not None:
        return "layers" if int(match[1]) < spec.num_layers else None
    if name == LM_HEAD and spec.tied_embeddings:
        return None
    return {EMBEDDING: "embed", NORM: "norm", LM_HEAD: "head"}.get(name)


def is_decoder_tensor(name: str) -> bool:
    """Whether a stored tensor has a name that stages of some model load. Those of vision towers do not."""
    return _DECODER.match(name) is not None


def check_supported(config: dict[str, Any]) -> str:
    """The model's family, as far as config.json alone can tell. Raises UnsupportedModel, BadCheckpoint."""
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        raise BadCheckpoint(
            "config.json names no model_type", hint="take the config.json of the model's own repository"
        )
    if "text_config" in config:
        raise UnsupportedModel(
            f"{family} is a model of several parts (text inside vision or audio)",
            hint="take a text-only checkpoint of it, for example one whose model_type is gemma3_text",
        )
    for key, what in _UNSUPPORTED_KEYS.items():
        if config.get(key):
            raise UnsupportedModel(
                f"{family} has {what} ({key} in config.json)",
                hint="decoders with grouped or sliding-window attention work: Llama, Mistral, Qwen, Gemma",
            )
    return family


def _positive_int(config: dict[str, Any], key: str, *, default: int | None = None, at_most: int = 1 << 31) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= at_most:
        raise BadCheckpoint(
            f"config.json has {key} = {value!r}, where a number from 1 to {at_most:,} belongs",
            hint="take the config.json of the model's own repository",
        )
    return value


def _tensor(tensors: Mapping[str, TensorInfo], name: str, *, columns: int) -> TensorInfo:
    tensor = tensors.get(name)
    if tensor is None:
        raise BadCheckpoint(
            f"the files hold no tensor {name}",
            hint="a file is missing, or the model is no decoder with Llama-like names; pull it again",
        )
    if tensor.shape[-1:] != (columns,):
        raise BadCheckpoint(
            f"{name} has the shape {tensor.shape}, but config.json says hidden_size {columns}",
            hint="config.json and the weights are of different models",
        )
    return tensor


def _layer_blocks(tensors: Mapping[str, TensorInfo], num_layers: int) -> list[list[WeightBlock]]:
    """The weights of each layer. Layers past the last one (draft heads that some files carry) are not the model's."""
    blocks: list[list[WeightBlock]] = [[] for _ in range(num_layers)]
    for name, tensor in tensors.items():
        match = _LAYER.match(name)
        if match is not None and int(match[1]) < num_layers:
            blocks[int(match[1])].append(weight_block(tensor))
    if [] in blocks:
        raise BadCheckpoint(
            f"the files hold no tensor of layer {blocks.index([])} of {num_layers}",
            hint="a file is missing; pull the model again",
        )
    return blocks


def _main_format(tensors: Mapping[str, TensorInfo]) -> str:
    """The format that holds most of the bytes."""
    held: Counter[str] = Counter()
    for tensor in tensors.values():
        held[tensor.format] += tensor.file_bytes
    return held.most_common(1)[0][0]
