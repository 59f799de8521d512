"""Which models the lean path runs: those whose config.json says nothing that it does not know. Imports no torch.

The library path runs everything else. A key that is not listed here is taken for a feature that is not there: slower is
better than silently wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys of every family that say nothing about the computation of a decode step.
_HARMLESS = _keys("""
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
_COMMON = _keys("""
    head_dim hidden_act hidden_size intermediate_size max_position_embeddings num_attention_heads num_hidden_layers
    num_key_value_heads rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings vocab_size
""")
_WINDOW = _keys("layer_types sliding_window use_sliding_window")
_GEMMA = _keys("""
    attention_bias attn_logit_softcapping final_logit_softcapping hidden_activation layer_types query_pre_attn_scalar
    sliding_window
""")
# What the path knows of each family beyond _COMMON.
_FAMILIES: Mapping[str, frozenset[str]] = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | _keys("_sliding_window_pattern rope_local_base_freq sliding_window_pattern"),
    "granite": _keys("""
        attention_bias attention_multiplier embedding_multiplier logits_scaling mlp_bias residual_multiplier
    """),
    "llama": _keys("attention_bias mlp_bias"),
    "mistral": _keys("sliding_window"),
    "mixtral": _keys("num_experts num_experts_per_tok num_local_experts sliding_window"),
    "olmo2": _keys("attention_bias"),
    "phi3": _keys("original_max_position_embeddings partial_rotary_factor sliding_window"),
    "qwen2": _WINDOW,
    "qwen3": _WINDOW | _keys("attention_bias"),
    "qwen3_moe": _keys("""
        attention_bias decoder_sparse_step mlp_only_layers moe_intermediate_size norm_topk_prob num_experts
        num_experts_per_tok num_local_experts sliding_window use_sliding_window
    """),
    "smollm3": _WINDOW | _keys("attention_bias mlp_bias no_rope_layer_interval no_rope_layers"),
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


def lean_reason(config: Mapping[str, Any], *, stacked_experts: bool = False) -> str | None:
    """None where the lean path runs a model of this Hugging Face config.json, else why it does not.

    `stacked_experts`: its files hold all experts of a layer in one tensor (`has_stacked_experts`).
    """
    config = config.get("text_config", config)
    family = str(config.get("model_type"))
    if family not in _FAMILIES:
        return f"the architecture {family} has no lean path"
    for key in _MUST_BE_FALSE:
        if config.get(key):
            return f"{key} = {config[key]!r} has no lean path"
    known = _HARMLESS | _COMMON | _FAMILIES[family] | set(_MUST_BE_FALSE)
    unknown = sorted(key for key, value in config.items() if value is not None and key not in known)
    if unknown:
        return f"config.json says what the lean path does not know: {', '.join(unknown)}"
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if activation not in _ACTIVATIONS:
        return f"the activation {activation} has no lean path"
    if family == "gemma3_text" and config.get("attn_logit_softcapping") is not None:
        return "attn_logit_softcapping of a gemma3_text has no lean path"
    kinds = sorted({str(kind) for kind in config.get("layer_types") or ()} - set(_LAYER_KINDS))
    if kinds:
        return f"layers of the kind {', '.join(kinds)} have no lean path"
    if stacked_experts:
        return "experts stacked in one tensor (mlp.experts.gate_up_proj) have no lean path"
    return _rope_reason(family, config)


def has_stacked_experts(names: Iterable[str]) -> bool:
    return any(name.endswith(".mlp.experts.gate_up_proj") for name in names)


def _rope_reason(family: str, config: Mapping[str, Any]) -> str | None:
    for found in (config.get("rope_scaling"), config.get("rope_parameters")):
        if not found:
            continue
        # Gemma 3 has one of these for each kind of layer.
        for rope in found.values() if all(kind in _LAYER_KINDS for kind in found) else (found,):
            reason = _one_rope_reason(family, rope or {})
            if reason is not None:
                return reason
    return None


def _one_rope_reason(family: str, rope: Mapping[str, Any]) -> str | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in _ROPE_TYPES:
        return f"rotary embeddings of the type {rope_type} have no lean path"
    unknown = sorted(key for key, value in rope.items() if value is not None and key not in _ROPE_KEYS)
    if unknown:
        return f"the rotary embedding has what the lean path does not know: {', '.join(unknown)}"
    if family != "phi3" and rope.get("partial_rotary_factor") not in (None, 1.0):
        return f"a partial rotary embedding of a {family} has no lean path"
    return None
