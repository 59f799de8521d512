"""Which layers look only at a sliding window, by the rules of each family's model class in transformers."""

from __future__ import annotations

from typing import Any

from transport.errors import BadCheckpoint, UnsupportedModel

_EVERY_LAYER = ("mistral", "mixtral", "phi3", "starcoder2", "ministral")
_QWEN = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
_PATTERN = {"gemma3_text": 6, "cohere2": 4}  # Every n-th layer is full.
_ALTERNATE = ("gemma2", "gpt_oss")  # Layers 0, 2, 4, … slide.
# What transformers assumes when config.json does not say.
_DEFAULT_WINDOW = {
    "gemma2": 4096,
    "gemma3_text": 4096,
    "cohere2": 4096,
    "mistral": 4096,
    "gpt_oss": 128,
} | dict.fromkeys(_QWEN, 4096)


def layer_windows(config: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer in tokens, None for full attention."""
    kinds = _layer_kinds(config, num_layers)
    if "sliding_attention" not in kinds:
        return (None,) * num_layers
    window = _window(config)
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise BadCheckpoint(
            f"config.json has sliding layers and sliding_window = {window!r}",
            hint="take the config.json of the model's own repository",
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _window(config: dict[str, Any]) -> Any:
    return config.get("sliding_window", _DEFAULT_WINDOW.get(config["model_type"]))


def _layer_kinds(config: dict[str, Any], num_layers: int) -> list[str]:
    kinds = config.get("layer_types")
    if kinds is None:
        return ["sliding_attention" if _slides(config, layer) else "full_attention" for layer in range(num_layers)]
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


def _slides(config: dict[str, Any], layer: int) -> bool:
    family = config["model_type"]
    if family in _PATTERN:
        pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", _PATTERN[family]))
        if not isinstance(pattern, int) or pattern < 1:
            raise BadCheckpoint(f"config.json has sliding_window_pattern = {pattern!r}", hint="download it again")
        return (layer + 1) % pattern != 0
    if family in _ALTERNATE:
        return layer % 2 == 0
    if family in _QWEN:
        from_layer = config.get("max_window_layers", 28)
        return bool(config.get("use_sliding_window") and _window(config) and layer >= from_layer)
    return family in _EVERY_LAYER and _window(config) is not None
