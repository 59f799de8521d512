"""Which model families run on MLX, and what the library's classes need to be told about each.

A family is listed here once the parity tests hold for it (logits within 1e-4 of transformers' in fp32). mlx-lm has
classes for many more, but several of them differ silently: see `arguments.py` for what is refused and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from transport.errors import UnsupportedModel

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_SCALED_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
_PLAIN_ROPE = frozenset({"default"})
_GEMMA_ACTIVATION = "gelu_pytorch_tanh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
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
    defaults: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    experts: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    scaled_embedding: bool = False
    array_masks: bool = False
    batched_decode: bool = True


_LLAMA = MappingProxyType(
    {"attention_bias": False, "mlp_bias": False, "head_dim": None, "num_key_value_heads": None, "sliding_window": None}
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(module="llama", rope_types=_SCALED_ROPE, defaults=_LLAMA),
        "mistral": Family(module="llama", rope_types=_SCALED_ROPE, defaults=_LLAMA),
        "smollm3": Family(
            module="smollm3",
            default_theta=2_000_000.0,
            rope_types=_SCALED_ROPE,
            defaults=MappingProxyType({**_LLAMA, "no_rope_layers": None, "no_rope_layer_interval": 4}),
        ),
        "olmo2": Family(module="olmo2", rope_types=_SCALED_ROPE, defaults=_LLAMA),
        "phi3": Family(
            module="phi3",
            defaults=MappingProxyType({"num_key_value_heads": None, "partial_rotary_factor": 1.0}),
        ),
        "qwen2": Family(module="qwen2", rope_types=_SCALED_ROPE),
        "qwen3": Family(module="qwen3", rope_types=_SCALED_ROPE, defaults=MappingProxyType({"head_dim": 128})),
        "gemma2": Family(
            module="gemma2",
            activation=_GEMMA_ACTIVATION,
            scaled_embedding=True,
            array_masks=True,
            batched_decode=False,
        ),
        "gemma3_text": Family(
            module="gemma3_text",
            activation=_GEMMA_ACTIVATION,
            default_theta=1_000_000.0,
            rope_types=frozenset({"default", "linear"}),
            scaled_embedding=True,
        ),
        "qwen3_moe": Family(
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
        "mixtral": Family(
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


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face configuration. Raises UnsupportedModel, naming those that are supported."""
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise UnsupportedModel(
            f"the MLX backend can't run {model_type!r} models",
            hint=f"supported there: {', '.join(sorted(FAMILIES))}; or run this model on torch devices only",
        )
    return FAMILIES[model_type]
