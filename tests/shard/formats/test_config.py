"""What a model is: the facts agree with transformers' own reading of the same config."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from shard.formats.checkpoint import TensorInfo
from shard.formats.config import spec_from
from shard.formats.spec import ModelSpec
from transport.errors import BadCheckpoint, UnsupportedModel

LAYERS = 8
SMALL = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 100,
}


def tensors(layers: int = LAYERS, *, head: bool = True, hidden: int = 64) -> dict[str, TensorInfo]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (100, hidden), "model.norm.weight": (hidden,)}
    if head:
        shapes["lm_head.weight"] = (100, hidden)
    shapes |= {f"model.layers.{layer}.mlp.up_proj.weight": (96, hidden) for layer in range(layers)}
    return {
        name: TensorInfo(name=name, shape=shape, format="BF16", file_bytes=2 * shape[0])
        for name, shape in shapes.items()
    }


def spec(config: dict[str, Any], **options: Any) -> ModelSpec:
    return spec_from(config, tensors(**options), file_bytes=1000)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "mistral"},
        {"model_type": "mistral", "sliding_window": 16},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mixtral", "sliding_window": 16},
        {"model_type": "qwen2"},
        {"model_type": "qwen2", "sliding_window": 16, "max_window_layers": 3},
        {"model_type": "qwen2", "sliding_window": 16, "max_window_layers": 3, "use_sliding_window": True},
        {"model_type": "qwen3", "sliding_window": 16, "max_window_layers": 2, "use_sliding_window": True},
        {"model_type": "gemma2"},
        {"model_type": "gemma2", "sliding_window": 16},
        {"model_type": "gemma3_text", "sliding_window": 16},
        {"model_type": "gemma3_text", "sliding_window": 16, "sliding_window_pattern": 3},
        {"model_type": "gemma3_text", "layer_types": ["full_attention", "sliding_attention"] * 4},
        {"model_type": "gpt_oss"},
        {"model_type": "phi3", "sliding_window": 16, "pad_token_id": 0},
    ],
    ids=str,
)
def test_windows_and_heads_are_transformers(config: dict[str, Any]) -> None:
    library = transformers.AutoConfig.for_model(**(SMALL | config))
    kinds = getattr(library, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if getattr(library, "sliding_window", None) else "full_attention"] * LAYERS
    ours = spec(SMALL | config)
    assert ours.windows == tuple(library.sliding_window if kind == "sliding_attention" else None for kind in kinds)
    if getattr(library, "head_dim", None) is not None:
        assert ours.kv_elements_per_token == (2 * library.num_key_value_heads * library.head_dim,) * LAYERS


def test_counts_and_cuts() -> None:
    facts = spec(SMALL | {"model_type": "llama", "tie_word_embeddings": False}, layers=LAYERS + 1)
    assert facts.layer_params == (96 * 64,) * LAYERS
    assert (facts.embed_params, facts.norm_params, facts.head_params) == (6400, 64, 6400)
    assert facts.legal_cuts == tuple(range(1, LAYERS))
    assert (facts.vocab_size, facts.context_tokens, facts.stored_dtype) == (100, 512, "BF16")
    assert not facts.tied_embeddings
    assert ModelSpec.from_json(facts.to_json()) == facts
    assert facts.head_dim is not None


def test_a_head_that_is_not_there_is_tied_unless_the_config_says_otherwise() -> None:
    tied = spec(SMALL | {"model_type": "llama"}, head=False)
    assert tied.tied_embeddings
    assert tied.head_params == tied.embed_params
    assert spec(SMALL | {"model_type": "gemma2"}).tied_embeddings
    with pytest.raises(BadCheckpoint, match=r"lm_head\.weight"):
        spec(SMALL | {"model_type": "llama", "tie_word_embeddings": False}, head=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": None}, "model_type"),
        ({"num_hidden_layers": 9}, "layer 8 of 9"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers"),
        ({"num_hidden_layers": "8"}, "num_hidden_layers"),
        ({"hidden_size": 128}, "hidden_size 128"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "gemma2", "sliding_window": -1}, "sliding_window"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(BadCheckpoint, match=words) as raised:
        spec(SMALL | {"model_type": "llama"} | change)
    assert raised.value.hint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_config": {}}, "several parts"),
        ({"kv_lora_rank": 512}, "kv_lora_rank"),
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers"),
        ({"layer_types": ["linear_attention"] * LAYERS}, "linear_attention"),
    ],
)
def test_what_cant_be_sized_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        spec(SMALL | {"model_type": "llama"} | change)
