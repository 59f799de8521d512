"""GGUF tensor names → Hugging Face names, for the architectures that are read from GGUF files."""

from __future__ import annotations

import re

from transport.errors import UnsupportedModel

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
ROPE_FACTORS = "rope_freqs.weight"

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
# Gemma has four norms a layer: the one before the MLP has a name of its own.
_GEMMA_LAYER = _LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def check_architecture(architecture: object) -> None:
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"GGUF files of the architecture {architecture!r} are not supported",
            hint=f"supported are {', '.join(ARCHITECTURES)}; other models work from a Hugging Face folder",
        )


def hugging_face_name(architecture: str, name: str) -> str:
    """The name transformers gives the tensor. Raises UnsupportedModel for one that it has no place for."""
    if name in _WHOLE:
        return _WHOLE[name]
    layers = _GEMMA_LAYER if architecture.startswith("gemma") else _LAYER
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in layers:
        raise UnsupportedModel(
            f"the GGUF's tensor {name!r} has no place in {architecture} as it is known here",
            hint="it may be a variant (a mixture of experts, an adapter); use the model's Hugging Face folder",
        )
    return f"model.layers.{match[1]}.{layers[match[2]]}.{match[3]}"
