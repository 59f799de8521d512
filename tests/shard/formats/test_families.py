"""The families table: every architecture is proven by a tiny model, and its defaults are transformers' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers

from shard.formats.config import layer_windows
from shard.formats.families import FAMILIES, GGUF_FAMILIES, Family, backends_of, family_of
from shard.torch_backend.fused.config import resolve
from tests.support.shard import tiny
from tests.support.shard.stage_runner import tiny_spec

LAYERS = 8
SIZES = {"num_hidden_layers": LAYERS, "hidden_size": 256, "num_attention_heads": 32, "vocab_size": 8, "pad_token_id": 0}

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)


def library(family: Family, **config: Any) -> Any:
    """transformers' reading of a config.json that says next to nothing."""
    return transformers.CONFIG_MAPPING[family.model_type].from_dict({**SIZES, **config})


def attribute(config: Any, name: str) -> Any:
    return getattr(config, name, None)


def windows_of(config: Any) -> tuple[int | None, ...]:
    """As transformers' layers read it: one window for all, unless there are kinds."""
    window, kinds = attribute(config, "sliding_window"), attribute(config, "layer_types")
    if attribute(config, "use_sliding_window") is False:
        window = None
    return tuple(window if kind == "sliding_attention" else None for kind in kinds or ["sliding_attention"] * LAYERS)


_KINDS = ["sliding_attention", "full_attention"] * 4
WINDOWS: tuple[dict[str, Any], ...] = (
    {},
    {"sliding_window": None},
    {"sliding_window": 16},
    {"use_sliding_window": True},
    {"sliding_window": 16, "max_window_layers": 3},
    {"sliding_window": 16, "max_window_layers": 3, "use_sliding_window": True},
    {"sliding_window": 16, "max_window_layers": 30, "use_sliding_window": True},
    {"sliding_window": 16, "use_sliding_window": True, "no_rope_layers": [1, 0] * 4},
    {"sliding_window": 16, "use_sliding_window": True, "no_rope_layer_interval": 2},
    {"sliding_window": 16, "sliding_window_pattern": 3},
    {"sliding_window": 16, "layer_types": _KINDS},
    {"sliding_window": 16, "use_sliding_window": True, "layer_types": _KINDS},
)


def makes_sense(family: Family, config: dict[str, Any]) -> bool:
    """Layers that always slide need a window, and not every architecture has two kinds of layers."""
    if "layer_types" in config:
        return family.slides not in ("never", "every_layer")
    return family.slides != "all_but_every_nth" or config.get("sliding_window", 1) is not None


def test_every_entry_has_a_tiny_model_and_every_tiny_model_an_entry() -> None:
    assert {tiny.tiny_config(name).model_type for name in tiny.FAMILIES} == set(FAMILIES)


def test_gguf_architectures_are_told_apart() -> None:
    assert len(GGUF_FAMILIES) == sum(family.gguf is not None for family in FAMILIES.values())


def test_an_architecture_without_an_entry_runs_nowhere() -> None:
    assert backends_of("mamba") == ()
    assert family_of({"model_type": "mamba"}).model_type == "mamba"
    assert backends_of("llama") == ("torch", "mlx")


@every_family
def test_sizes_that_config_json_leaves_out_are_transformers(family: Family) -> None:
    config = library(family)
    assert family.head_dim(SIZES) == (attribute(config, "head_dim") or SIZES["hidden_size"] // 32)
    assert family.kv_heads(SIZES) == config.num_key_value_heads
    assert family.tied_by_default == config.tie_word_embeddings
    rope = config.rope_parameters
    assert family.default_rope_theta == rope.get("full_attention", rope)["rope_theta"]
    assert family.activation == (attribute(config, "hidden_activation") or config.hidden_act)


@pytest.mark.parametrize(
    ("family", "config"),
    [(family, config) for family in FAMILIES.values() for config in WINDOWS if makes_sense(family, config)],
    ids=lambda value: str(getattr(value, "model_type", value)),
)
def test_windows_are_transformers(family: Family, config: dict[str, Any]) -> None:
    expected = windows_of(library(family, **config))
    if family.slides == "never":  # Its layers do not look at such a key.
        expected = (None,) * LAYERS
    assert layer_windows({**SIZES, "model_type": family.model_type, **config}, LAYERS) == expected


@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if family.fused], ids=lambda f: f.model_type)
def test_the_fused_path_resolves_the_same_facts(family: Family) -> None:
    """Of every family that it runs: its windows are the planner's, and its scales transformers'."""
    config = tiny.tiny_config(family.model_type)
    facts = resolve(config.to_dict(), tiny_spec(0, tiny.NUM_LAYERS))
    assert tuple(layer.window for layer in facts.layers) == layer_windows(config.to_dict(), tiny.NUM_LAYERS)
    assert facts.num_kv_heads == family.kv_heads(config.to_dict())
    assert facts.head_dim == family.head_dim(config.to_dict())
    assert np.isfinite(facts.attention_scale)
