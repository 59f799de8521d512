"""What the fused path needs to know of a model, resolved once from the library's config.

Defaults and rotary frequencies are the library's own, so that both paths compute the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from shard.stage import StageSpec
from shard.torch_backend.library.config import library_config, slice_config

Activation = Literal["silu", "gelu_pytorch_tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormNames:
    """The norms of a layer as its files name them; None where the family has none in that place."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


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
    has_fused_tensors: bool
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


_GEMMA_NORMS = NormNames(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_OLMO_NORMS = NormNames(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)
_QK_NORMS: Mapping[str, Literal["head", "projection"]] = {
    "gemma3_text": "head",
    "olmo2": "projection",
    "qwen3": "head",
    "qwen3_moe": "head",
}
_ALL_LAYERS_SLIDE = ("mistral", "mixtral", "phi3", "qwen3_moe")


def resolve(config: dict[str, Any], spec: StageSpec) -> FusedConfig:
    """The facts of layers [first, last) of a config that `support.why_not_fused` accepts.

    Raises what the library path raises: UnsupportedModel, BadCheckpoint.
    """
    full = library_config(config)
    stage = slice_config(full, spec)
    family = stage.model_type
    is_gemma = family.startswith("gemma")
    head_dim = getattr(stage, "head_dim", None) or stage.hidden_size // stage.num_attention_heads
    attention_bias = bool(getattr(stage, "attention_bias", False))
    query_scalar = stage.query_pre_attn_scalar if is_gemma else head_dim
    return FusedConfig(
        hidden_size=stage.hidden_size,
        intermediate_size=stage.intermediate_size,
        vocab_size=stage.vocab_size,
        num_heads=stage.num_attention_heads,
        num_kv_heads=stage.num_key_value_heads,
        head_dim=head_dim,
        layers=tuple(_layer(stage, index) for index in range(spec.last - spec.first)),
        ropes=_ropes(stage, head_dim),
        experts=_experts(stage),
        norms=_GEMMA_NORMS if is_gemma else _OLMO_NORMS if family == "olmo2" else NormNames(),
        norm_eps=stage.rms_norm_eps,
        norm_offset=1.0 if is_gemma else 0.0,
        qk_norm=_QK_NORMS.get(family),
        has_fused_tensors=family == "phi3",
        qkv_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=bool(getattr(stage, "mlp_bias", False)),
        attention_scale=stage.attention_multiplier if family == "granite" else query_scalar**-0.5,
        attention_softcap=stage.attn_logit_softcapping if family == "gemma2" else None,
        final_softcap=stage.final_logit_softcapping if is_gemma else None,
        embedding_scale=stage.hidden_size**0.5 if is_gemma else float(getattr(stage, "embedding_multiplier", 1.0)),
        residual_multiplier=float(getattr(stage, "residual_multiplier", 1.0)),
        logits_divisor=float(getattr(stage, "logits_scaling", 1.0)),
        activation=stage.hidden_activation if is_gemma else stage.hidden_act,
        tied_embeddings=bool(full.tie_word_embeddings),
    )


def _layer(stage: Any, index: int) -> LayerFacts:
    """Layer `index` of a sliced config. `Any`: transformers is untyped."""
    family = stage.model_type
    kind = _kind(stage, index)
    if family in _ALL_LAYERS_SLIDE:
        window = stage.sliding_window
    else:
        window = stage.sliding_window if kind == "sliding_attention" else None
    if family == "smollm3" and not stage.use_sliding_window:
        window = None
    has_rope = family != "smollm3" or bool(stage.no_rope_layers[index])
    rope = kind if family == "gemma3_text" else "every_layer"
    is_sparse = family == "mixtral" or (family == "qwen3_moe" and index not in stage.mlp_only_layers)
    return LayerFacts(window=window, rope=rope if has_rope else None, is_sparse=is_sparse)


def _experts(stage: Any) -> ExpertFacts | None:
    if stage.model_type not in ("mixtral", "qwen3_moe"):
        return None
    return ExpertFacts(
        num_experts=stage.num_experts,
        top_k=stage.num_experts_per_tok,
        intermediate_size=getattr(stage, "moe_intermediate_size", stage.intermediate_size),
        normalize=bool(getattr(stage, "norm_topk_prob", True)),
    )


def _kind(stage: Any, index: int) -> str:
    kinds = getattr(stage, "layer_types", None)
    return "full_attention" if kinds is None else str(kinds[index])


def _ropes(stage: Any, head_dim: int) -> dict[str, Rope]:
    if stage.model_type != "gemma3_text":
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
