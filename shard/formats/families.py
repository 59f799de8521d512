"""The families table says, for each architecture, which backends and paths run it, and what they must know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from transport.errors import UnsupportedModel


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys of every family that say nothing about the computation of a decode step.
_IGNORED_KEYS = _keys("""
    _attn_implementation _attn_implementation_autoset _name_or_path architectures attention_dropout auto_map
    bad_words_ids begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward
    decoder_start_token_id do_sample dtype early_stopping embd_pdrop eos_token_id experts_implementation finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder is_llama_config label2id
    length_penalty max_length max_window_layers min_length mlx_lm_version model_type no_repeat_ngram_size num_beams
    num_return_sequences output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix
    pretraining_tp problem_type quantization quantization_config remove_invalid_values repetition_penalty resid_pdrop
    return_dict return_dict_in_generate router_aux_loss_coef router_jitter_noise sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16
    use_cache
""")
_COMMON_KEYS = _keys("""
    head_dim hidden_act hidden_size intermediate_size max_position_embeddings num_attention_heads num_hidden_layers
    num_key_value_heads rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings vocab_size
""")
_WINDOW_KEYS = _keys("layer_types sliding_window use_sliding_window")
_GEMMA_KEYS = _keys("""
    attention_bias attn_logit_softcapping final_logit_softcapping hidden_activation layer_types query_pre_attn_scalar
    sliding_window
""")
# What the path knows of each family beyond _COMMON.
_FUSED_KEYS: Mapping[str, frozenset[str]] = {
    "gemma2": _GEMMA_KEYS,
    "gemma3_text": _GEMMA_KEYS | _keys("_sliding_window_pattern rope_local_base_freq sliding_window_pattern"),
    "granite": _keys("""
        attention_bias attention_multiplier embedding_multiplier logits_scaling mlp_bias residual_multiplier
    """),
    "llama": _keys("attention_bias mlp_bias"),
    "mistral": _keys("sliding_window"),
    "mixtral": _keys("num_experts num_experts_per_tok num_local_experts sliding_window"),
    "olmo2": _keys("attention_bias"),
    "phi3": _keys("original_max_position_embeddings partial_rotary_factor sliding_window"),
    "qwen2": _WINDOW_KEYS,
    "qwen3": _WINDOW_KEYS | _keys("attention_bias"),
    "qwen3_moe": _keys("""
        attention_bias decoder_sparse_step mlp_only_layers moe_intermediate_size norm_topk_prob num_experts
        num_experts_per_tok num_local_experts sliding_window use_sliding_window
    """),
    "smollm3": _WINDOW_KEYS | _keys("attention_bias mlp_bias no_rope_layer_interval no_rope_layers"),
}
# Features that the path does not have: it runs a model whose config.json says that they are off.
_MUST_BE_FALSE = (
    "add_cross_attention",
    "is_encoder_decoder",
    "pruned_heads",
    "rope_interleaved",
    "use_bidirectional_attention",
)
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
_ROPE_TYPES = ("default", "linear", "llama3", "longrope", "su", "yarn")
_ROPE_KEYS = _keys("""
    attention_factor beta_fast beta_slow factor high_freq_factor long_factor long_mscale low_freq_factor mscale
    mscale_all_dim original_max_position_embeddings partial_rotary_factor rope_theta rope_type short_factor short_mscale
    truncate type
""")
_LAYER_KINDS = ("full_attention", "sliding_attention")


def why_not_fused(config: Mapping[str, Any], *, stacked_experts: bool = False) -> str | None:
    """None where the fused path runs a model of this Hugging Face config.json, else why it does not.

    `stacked_experts`: its files hold all experts of a layer in one tensor (`has_stacked_experts`).
    """
    config = config.get("text_config", config)
    family = str(config.get("model_type"))
    if family not in _FUSED_KEYS:
        return f"the architecture {family} has no fused path"
    for key in _MUST_BE_FALSE:
        if config.get(key):
            return f"{key} = {config[key]!r} has no fused path"
    known = _IGNORED_KEYS | _COMMON_KEYS | _FUSED_KEYS[family] | set(_MUST_BE_FALSE)
    unknown = sorted(key for key, value in config.items() if value is not None and key not in known)
    if unknown:
        return f"config.json says what the fused path does not know: {', '.join(unknown)}"
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if activation not in _ACTIVATIONS:
        return f"the activation {activation} has no fused path"
    if family == "gemma3_text" and config.get("attn_logit_softcapping") is not None:
        return "attn_logit_softcapping of a gemma3_text has no fused path"
    kinds = sorted({str(kind) for kind in config.get("layer_types") or ()} - set(_LAYER_KINDS))
    if kinds:
        return f"layers of the kind {', '.join(kinds)} have no fused path"
    if stacked_experts:
        return "experts stacked in one tensor (mlp.experts.gate_up_proj) have no fused path"
    return _why_rope_not_fused(family, config)


def has_stacked_experts(names: Iterable[str]) -> bool:
    return any(name.endswith(".mlp.experts.gate_up_proj") for name in names)


def _why_rope_not_fused(family: str, config: Mapping[str, Any]) -> str | None:
    for found in (config.get("rope_scaling"), config.get("rope_parameters")):
        if not found:
            continue
        # Gemma 3 has one of these for each kind of layer.
        for rope in found.values() if all(kind in _LAYER_KINDS for kind in found) else (found,):
            reason = _why_one_rope_not_fused(family, rope or {})
            if reason is not None:
                return reason
    return None


def _why_one_rope_not_fused(family: str, rope: Mapping[str, Any]) -> str | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in _ROPE_TYPES:
        return f"rotary embeddings of the type {rope_type} have no fused path"
    unknown = sorted(key for key, value in rope.items() if value is not None and key not in _ROPE_KEYS)
    if unknown:
        return f"the rotary embedding has what the fused path does not know: {', '.join(unknown)}"
    if family != "phi3" and rope.get("partial_rotary_factor") not in (None, 1.0):
        return f"a partial rotary embedding of a {family} has no fused path"
    return None


_EMPTY: Mapping[str, Any] = MappingProxyType({})
_SCALED_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
_PLAIN_ROPE = frozenset({"default"})
_GEMMA_ACTIVATION = "gelu_pytorch_tanh"


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxFamily:
    """How one `model_type` maps to a module of mlx_lm.models.

    `rope_types` are those that the class computes as transformers does (some classes ignore scaling without a word).
    `defaults` are the configuration keys that a config.json may leave out, with transformers' values.
    `experts` maps a stacked parameter's path in a layer to its per-expert name in files, `{expert}` left open.
    `array_masks`: the class can't take the mask "causal". `batched_decode`: its attention takes masks per sequence.
    """

    module: str
    activation: str = "silu"
    default_theta: float = 10_000.0
    rope_types: frozenset[str] = _PLAIN_ROPE
    defaults: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    experts: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    scaled_embedding: bool = False
    array_masks: bool = False
    batched_decode: bool = True


_LLAMA_DEFAULTS = MappingProxyType(
    {"attention_bias": False, "mlp_bias": False, "head_dim": None, "num_key_value_heads": None, "sliding_window": None}
)

MLX_FAMILIES: Mapping[str, MlxFamily] = MappingProxyType(
    {
        "llama": MlxFamily(module="llama", rope_types=_SCALED_ROPE, defaults=_LLAMA_DEFAULTS),
        "mistral": MlxFamily(module="llama", rope_types=_SCALED_ROPE, defaults=_LLAMA_DEFAULTS),
        "smollm3": MlxFamily(
            module="smollm3",
            default_theta=2_000_000.0,
            rope_types=_SCALED_ROPE,
            defaults=MappingProxyType({**_LLAMA_DEFAULTS, "no_rope_layers": None, "no_rope_layer_interval": 4}),
        ),
        "olmo2": MlxFamily(module="olmo2", rope_types=_SCALED_ROPE, defaults=_LLAMA_DEFAULTS),
        "phi3": MlxFamily(
            module="phi3",
            defaults=MappingProxyType({"num_key_value_heads": None, "partial_rotary_factor": 1.0}),
        ),
        "qwen2": MlxFamily(module="qwen2", rope_types=_SCALED_ROPE),
        "qwen3": MlxFamily(module="qwen3", rope_types=_SCALED_ROPE, defaults=MappingProxyType({"head_dim": 128})),
        "gemma2": MlxFamily(
            module="gemma2",
            activation=_GEMMA_ACTIVATION,
            scaled_embedding=True,
            array_masks=True,
            batched_decode=False,
        ),
        "gemma3_text": MlxFamily(
            module="gemma3_text",
            activation=_GEMMA_ACTIVATION,
            default_theta=1_000_000.0,
            rope_types=frozenset({"default", "linear"}),
            scaled_embedding=True,
        ),
        "qwen3_moe": MlxFamily(
            module="qwen3_moe",
            defaults=MappingProxyType({"head_dim": 128, "mlp_only_layers": [], "decoder_sparse_step": 1}),
            experts=MappingProxyType(
                {
                    "mlp.switch_mlp.gate_proj.weight": "mlp.experts.{expert}.gate_proj.weight",
                    "mlp.switch_mlp.up_proj.weight": "mlp.experts.{expert}.up_proj.weight",
                    "mlp.switch_mlp.down_proj.weight": "mlp.experts.{expert}.down_proj.weight",
                }
            ),
        ),
        "mixtral": MlxFamily(
            module="mixtral",
            default_theta=1_000_000.0,
            experts=MappingProxyType(
                {
                    "block_sparse_moe.switch_mlp.gate_proj.weight": "block_sparse_moe.experts.{expert}.w1.weight",
                    "block_sparse_moe.switch_mlp.down_proj.weight": "block_sparse_moe.experts.{expert}.w2.weight",
                    "block_sparse_moe.switch_mlp.up_proj.weight": "block_sparse_moe.experts.{expert}.w3.weight",
                }
            ),
        ),
    }
)


def mlx_family_of(config: Mapping[str, Any]) -> MlxFamily:
    """The family of a Hugging Face configuration. Raises UnsupportedModel, naming those that are supported."""
    model_type = str(config.get("model_type"))
    if model_type not in MLX_FAMILIES:
        raise UnsupportedModel(
            f"the MLX backend can't run {model_type!r} models",
            hint=f"supported there: {', '.join(sorted(MLX_FAMILIES))}; or run this model on torch devices only",
        )
    return MLX_FAMILIES[model_type]
