"""mlx-lm's model classes, without the rest of it, and their arguments from a Hugging Face config, or a refusal."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from shard.formats.families import ExpertNames, Family, MlxFacts, architectures_of
from shard.formats.spec import ModelSpec
from transport.errors import BadCheckpoint, UnsupportedModel


def mlx_facts(family: Family) -> MlxFacts:
    """Raises UnsupportedModel, naming the architectures that are supported."""
    if family.mlx is None:
        raise UnsupportedModel(
            f"the MLX backend can't run {family.model_type!r} models",
            hint=f"supported there: {architectures_of('mlx')}; or run this model on torch devices only",
        )
    return family.mlx


def stacked_names(experts: ExpertNames) -> dict[str, str]:
    """mlx-lm's path in a layer of each parameter that holds all experts → the name of one, `{expert}` left open."""
    return {
        f"{experts.block}.switch_mlp.{projection}.weight": experts.tensor("{expert}", projection)
        for projection in ("gate_proj", "up_proj", "down_proj")
    }


def model_module(name: str) -> ModuleType:
    """The module mlx_lm.models.`name`. Raises UnsupportedModel where mlx-lm is not installed.

    `import mlx_lm` runs its command-line tools: transformers and torch come along (3 s, 200 MB that the planner would
    have to reserve in every MLX worker), and the process's limit of open files is lowered. The model classes need
    none of it, so their package is imported under an empty parent, which is taken away again afterwards.
    """
    path = f"mlx_lm.models.{name}"
    if path in sys.modules:
        return sys.modules[path]
    if "mlx_lm" in sys.modules:
        return importlib.import_module(path)
    found = importlib.util.find_spec("mlx_lm")
    if found is None or found.submodule_search_locations is None:
        raise UnsupportedModel(
            "mlx-lm is not installed", hint="pip install 'potluck[mlx]', or run this model on torch devices only"
        )
    parent = ModuleType("mlx_lm")
    parent.__path__ = list(found.submodule_search_locations)
    sys.modules["mlx_lm"] = parent
    try:
        return importlib.import_module(path)
    finally:
        del sys.modules["mlx_lm"]


_HINT = "run this model on torch devices only"
_SAME_AS_LIBRARY = {"rope_traditional": False, "rope_parameters": None, "layer_types": None}


def model_arguments(
    config: Mapping[str, Any], model: ModelSpec, family: Family, arguments: type[Any], *, sliding: bool
) -> Any:
    """`arguments` (the class's ModelArgs) filled from `config`, for its layers with (`sliding`) or without a window.

    Gemma 3's class can only place its two kinds of layers at regular intervals: it is asked for one kind throughout.
    Raises UnsupportedModel for a feature that the class lacks, BadCheckpoint for a key that the file should hold.
    """
    facts = mlx_facts(family)
    _check_supported(config, family, facts)
    known = inspect.signature(arguments).parameters
    values: dict[str, Any] = {**_SAME_AS_LIBRARY, **facts.defaults}
    values.update({key: value for key, value in config.items() if value is not None})
    # transformers 5 renamed this key of qwen3_moe when it writes a config.
    if "num_local_experts" in config:
        values.setdefault("num_experts", config["num_local_experts"])
    values.update(_rope(config, family, facts))
    # The facts that spec and config both state come from the spec, which has resolved the defaults of old files.
    values.update(
        num_hidden_layers=model.num_layers,
        tie_word_embeddings=model.tied_embeddings,
        head_dim=family.head_dim(config),
        num_key_value_heads=family.kv_heads(config),
        sliding_window_pattern=model.num_layers + 1 if sliding else 1,
        # Windows are ours (`KVSlot`, masks), and a class given only sliding layers fails for want of a full one.
        layer_types=None,
        sliding_window=next((window for window in model.windows if window is not None), None),
    )
    missing = sorted(name for name in known if name not in values)
    if missing:
        raise BadCheckpoint(
            f"config.json of this {config['model_type']} model lacks {', '.join(missing)}",
            hint="pull the model again, or complete its config.json",
        )
    return arguments(**{name: values[name] for name in known})


def _check_supported(config: Mapping[str, Any], family: Family, facts: MlxFacts) -> None:
    name = family.model_type
    if config.get("model_file"):
        raise UnsupportedModel(
            "config.json names a model_file: code that comes with a model is never run",
            hint="use a checkpoint of a supported architecture without its own code",
        )
    activation = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    attention_cap = config.get("attn_logit_softcapping")
    if family.caps_attention and not attention_cap:
        raise UnsupportedModel(f"the MLX backend can't run {name} without attn_logit_softcapping", hint=_HINT)
    partial = config.get("partial_rotary_factor")
    refused = {
        "hidden_act": activation if activation != family.activation else None,
        "attn_logit_softcapping": None if family.caps_attention else attention_cap,
        "use_bidirectional_attention": config.get("use_bidirectional_attention"),
        "attention_bias": config.get("attention_bias") if "attention_bias" not in facts.defaults else None,
        "partial_rotary_factor": partial if partial != 1.0 else None,
    }
    for key, value in refused.items():
        if value:
            raise UnsupportedModel(f"the MLX backend can't run {name} with {key} = {value!r}", hint=_HINT)


def _rope(config: Mapping[str, Any], family: Family, facts: MlxFacts) -> dict[str, Any]:
    """rope_theta, rope_scaling and rope_local_base_freq from either generation of configuration keys."""
    nested = config.get("rope_parameters") or {}
    by_type = {key: value for key, value in nested.items() if isinstance(value, Mapping)}
    full: Mapping[str, Any] = by_type.get("full_attention", {}) if by_type else nested
    local: Mapping[str, Any] = by_type.get("sliding_attention", {})
    scaling = dict(config.get("rope_scaling") or full)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in facts.rope_types or local.get("rope_type", "default") != "default":
        raise UnsupportedModel(
            f"the MLX backend can't run {config['model_type']} with rope type {kind!r}",
            hint=f"supported there: {', '.join(sorted(facts.rope_types))}; {_HINT}",
        )
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel(f"the MLX backend can't run {config['model_type']} with a partial rope", hint=_HINT)
    if kind != "default":
        scaling["rope_type"] = scaling["type"] = kind
        scaling.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return {
        "rope_theta": full.get("rope_theta") or config.get("rope_theta") or family.default_rope_theta,
        "rope_local_base_freq": local.get("rope_theta") or config.get("rope_local_base_freq") or 10_000.0,
        "rope_scaling": scaling if kind != "default" else None,
    }
