"""What the fused path needs to know of a model, resolved once from the library's config.

Defaults and rotary frequencies are the library's own, so that both paths compute the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from shard.formats.config import layer_windows
from shard.formats.families import Activation, Family, NormNames, family_of
from shard.stage import StageSpec
from shard.torch_backend.library.config import library_config, slice_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding: angle = position · inverse_frequencies [rotary_dim / 2] (float32, on the CPU), cos and sin
    times `scaling`."""

    inverse_frequencies: torch.Tensor
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFacts:
    """Mixtures of experts: their number, how many a token chooses, their width, whether the weights are made to sum to
    1."""

    num_experts: int
    top_k: int
    intermediate_size: int
    normalize: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """What differs from layer to layer: a sliding window in tokens, which of the model's rotary embeddings turns its
    queries and keys (None: no position at all), whether its MLP is a mixture of experts."""

    window: int | None
    rope: str | None
    is_sparse: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedConfig:
    """One stage's layers and what they share. Norm weights are w + `norm_offset`; qk norms go over each head or over
    the whole projection; logits are divided by `logits_divisor`."""

    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerFacts, ...]
    ropes: Mapping[str, Rope]
    experts: ExpertFacts | None
    norms: NormNames
    norm_eps: float
    norm_offset: float
    qk_norm: Literal["head", "projection"] | None
    fused_tensors: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    attention_scale: float
    attention_softcap: float | None
    final_softcap: float | None
    embedding_scale: float
    residual_multiplier: float
    logits_divisor: float
    activation: Activation
    tied_embeddings: bool


def resolve(config: dict[str, Any], spec: StageSpec) -> FusedConfig:
    """The facts of layers [first, last) of a config that `support.why_not_fused` accepts.

    Raises what the library path raises: UnsupportedModel, BadCheckpoint.
    """
    family = family_of(config)
    assert family.fused is not None
    full = library_config(config)
    stage = slice_config(full, spec)
    keys = family.fused.keys

    def known(key: str, default: Any = None) -> Any:  # Of transformers' config, which is untyped.
        return getattr(stage, key, default) if key in keys else default

    head_dim = getattr(stage, "head_dim", None) or stage.hidden_size // stage.num_attention_heads
    attention_bias = bool(getattr(stage, "attention_bias", False))
    windows = layer_windows(config.get("text_config", config), spec.num_layers)[spec.first : spec.last]
    return FusedConfig(
        hidden_size=stage.hidden_size,
        intermediate_size=stage.intermediate_size,
        vocab_size=stage.vocab_size,
        num_heads=stage.num_attention_heads,
        num_kv_heads=stage.num_key_value_heads,
        head_dim=head_dim,
        layers=tuple(_layer(family, stage, index, window) for index, window in enumerate(windows)),
        ropes=_ropes(family, stage, head_dim),
        experts=None if family.experts is None else _experts(stage),
        norms=family.norms,
        norm_eps=stage.rms_norm_eps,
        norm_offset=1.0 if family.norm_plus_one else 0.0,
        qk_norm=family.fused.qk_norm,
        fused_tensors=family.fused_tensors,
        qkv_bias=attention_bias or family.qkv_bias,
        output_bias=attention_bias,
        mlp_bias=bool(getattr(stage, "mlp_bias", False)),
        attention_scale=known("attention_multiplier") or known("query_pre_attn_scalar", head_dim) ** -0.5,
        attention_softcap=stage.attn_logit_softcapping if family.caps_attention else None,
        final_softcap=stage.final_logit_softcapping if family.caps_logits else None,
        embedding_scale=stage.hidden_size**0.5
        if family.scaled_embedding
        else float(known("embedding_multiplier", 1.0)),
        residual_multiplier=float(known("residual_multiplier", 1.0)),
        logits_divisor=float(known("logits_scaling", 1.0)),
        activation=known("hidden_activation") or stage.hidden_act,
        tied_embeddings=bool(full.tie_word_embeddings),
    )


def _layer(family: Family, stage: Any, index: int, window: int | None) -> LayerFacts:
    """Layer `index` of a sliced config. `Any`: transformers is untyped."""
    per_kind = family.fused is not None and family.fused.rope_per_kind
    rope = stage.layer_types[index] if per_kind else "every_layer"
    has_rope = family.slides != "layers_without_rope" or bool(stage.no_rope_layers[index])
    is_sparse = family.experts is not None and index not in getattr(stage, "mlp_only_layers", ())
    return LayerFacts(window=window, rope=rope if has_rope else None, is_sparse=is_sparse)


def _experts(stage: Any) -> ExpertFacts:
    return ExpertFacts(
        num_experts=stage.num_experts,
        top_k=stage.num_experts_per_tok,
        intermediate_size=getattr(stage, "moe_intermediate_size", stage.intermediate_size),
        normalize=bool(getattr(stage, "norm_topk_prob", True)),
    )


def _ropes(family: Family, stage: Any, head_dim: int) -> dict[str, Rope]:
    if family.fused is None or not family.fused.rope_per_kind:
        return {"every_layer": _rope(stage, None, head_dim)}
    return {kind: _rope(stage, kind, head_dim) for kind in sorted(set(stage.layer_types))}


def _rope(stage: Any, kind: str | None, head_dim: int) -> Rope:
    """The library's frequencies: RoPE's own formula (Su et al. 2021), or its function for a scaled one."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = stage.rope_parameters if kind is None else stage.rope_parameters[kind]
    rope_type = parameters["rope_type"]
    if rope_type != "default":
        named = {} if kind is None else {"layer_type": kind}
        frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](stage, None, **named)
        return Rope(inverse_frequencies=frequencies.float(), scaling=float(scaling))
    rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float) / rotary_dim
    return Rope(inverse_frequencies=1.0 / (parameters["rope_theta"] ** exponents), scaling=1.0)
