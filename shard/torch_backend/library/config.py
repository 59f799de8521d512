"""The library path's configs are transformers' own, cut to a stage's layers."""

from __future__ import annotations

import copy
import sys
from typing import Any

from shard.formats.families import architectures_of, family_of
from shard.stage import StageSpec
from transport.errors import BadCheckpoint, UnsupportedModel


def config_classes() -> Any:
    """By architecture. `Any`: transformers is untyped.

    Beside every config it imports a check that an activation is one that its layers have, and with the layers come
    torch's compiler and its distributed tensors: more than two seconds of a worker's start. Where it finds no torch it
    leaves the check out by itself, which no architecture that is supported here has.
    """
    import transformers
    from transformers.utils import import_utils

    if "transformers.utils.type_validators" not in sys.modules:
        finds_torch = import_utils.is_torch_available
        import_utils.is_torch_available = lambda: False
        try:
            import transformers.utils.type_validators
        finally:
            import_utils.is_torch_available = finds_torch
    return transformers.CONFIG_MAPPING


# Config lists with one item a layer, and lists of layer numbers.
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


def library_config(config: dict[str, Any]) -> Any:
    """The transformers config of a whole model. `Any`: transformers is untyped.

    Raises UnsupportedModel for an architecture or a quantized format that can't be run, BadCheckpoint for a config that
    transformers refuses.
    """
    if "text_config" in config:
        config = config["text_config"]
    family = family_of(config)
    architecture = family.model_type
    if not family.torch_library:
        raise UnsupportedModel(
            f"the torch backend can't run the architecture {architecture}",
            hint=f"supported: {architectures_of('torch')}",
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModel(f"the checkpoint is quantized with {method}", hint="choose a bf16 or GGUF version of it")
    try:
        return config_classes()[architecture].from_dict(_with_current_rope_names(config))
    except (KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"config.json of this {architecture} model is not valid: {error}") from error


def _with_current_rope_names(config: dict[str, Any]) -> dict[str, Any]:
    """A copy (transformers changes what it is given), with the first Phi-3's name for longrope replaced."""
    config = copy.deepcopy(config)
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict) and "su" in (scaling.get("type"), scaling.get("rope_type")):
        scaling["type"] = scaling["rope_type"] = "longrope"
        if "original_max_position_embeddings" in config:
            scaling.setdefault("original_max_position_embeddings", config["original_max_position_embeddings"])
    return config


def slice_config(full: Any, spec: StageSpec) -> Any:
    """The config of a model of layers [first, last) only: what depends on a layer's absolute number is resolved."""
    if full.num_hidden_layers != spec.num_layers:
        raise BadCheckpoint(f"the plan says {spec.num_layers} layers, config.json {full.num_hidden_layers}")
    _check_rope(full, spec)
    data = full.to_dict()
    data["num_hidden_layers"] = spec.last - spec.first
    for key in _PER_LAYER:
        if data.get(key) is not None:
            data[key] = list(data[key][spec.first : spec.last])
    if "decoder_sparse_step" in data:
        dense = set(data.get("mlp_only_layers") or ())
        dense |= {layer for layer in range(spec.num_layers) if (layer + 1) % data["decoder_sparse_step"]}
        data["mlp_only_layers"] = sorted(layer - spec.first for layer in dense if spec.first <= layer < spec.last)
        data["decoder_sparse_step"] = 1
    if "embedding_multiplier" in data and not spec.is_first:
        data["embedding_multiplier"] = 1.0  # Granite scales whatever comes in, also another stage's hidden states.
    data["tie_word_embeddings"] = False  # The loader ties, where one stage holds both ends.
    return type(full).from_dict(data)


def _check_rope(config: Any, spec: StageSpec) -> None:
    """Refuse rotary scaling that changes with the longest position in the batch: a sequence's KV would depend on the
    others', and on when it was computed."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = parameters.values() if all(isinstance(value, dict) for value in parameters.values()) else (parameters,)
    for kind in kinds:
        rope_type = kind.get("rope_type", "default")
        if rope_type == "dynamic":
            raise UnsupportedModel("dynamic rotary scaling changes with the length of a text and can't be cached")
        original = kind.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", config.max_position_embeddings
        )
        if rope_type == "longrope" and spec.context_tokens > original:
            raise UnsupportedModel(
                f"this model's rotary scaling (longrope) is supported up to {original} tokens, "
                f"the plan asks for {spec.context_tokens}",
                hint=f"use --context {original} or less",
            )
