"""Builds a stage on MLX: mlx-lm's model class, of which only this stage's layers ever get memory.

First mlx-lm's classes, without the rest of it, and their arguments from a Hugging Face config, or a refusal.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import mlx.core as mx

from shard.formats.checkpoint import Checkpoint
from shard.formats.families import ExpertNames, Family, MlxFacts, architectures_of, family_of
from shard.formats.spec import ModelSpec
from shard.mlx_backend.kv import kv_group_size
from shard.mlx_backend.shard import MlxShard, StageModules, use_cpu_kernels
from shard.mlx_backend.weights import ModuleSource, Progress, load_weights, with_quantized_modules
from shard.stage import StageSpec
from transport.errors import BadCheckpoint, DoesNotFit, UnsupportedModel


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


_NO_EXPERTS: Mapping[str, str] = MappingProxyType({})


def build_mlx_shard(checkpoint: Checkpoint, spec: StageSpec, progress: Progress = lambda done, total: None) -> MlxShard:
    """Load layers [spec.first, spec.last) and what the stage needs besides. `progress(read_bytes, total_bytes)`.

    Raises UnsupportedModel for an architecture or a feature that can't run here, BadCheckpoint for bad files,
    DoesNotFit where memory runs out.
    """
    family = family_of(checkpoint.config)
    facts = mlx_facts(family)
    group = kv_group_size(spec.kv, checkpoint.spec.head_dim)
    if spec.device.endswith(":cpu"):
        mx.set_default_device(mx.cpu)
    modules, parts = _modules(checkpoint, spec, family, facts)
    try:
        weights_bytes = load_weights(parts, checkpoint, spec.compute_dtype, progress)
    except (RuntimeError, MemoryError) as error:  # MLX reports allocation failures as RuntimeError
        raise DoesNotFit(
            f"{spec.device} has no memory left for layers [{spec.first}, {spec.last}): {error}",
            hint="give this device fewer layers, lower --context, or add another device",
        ) from error
    if mx.default_device() == mx.Device(mx.cpu):
        for layer in modules.layers:
            use_cpu_kernels(layer)
    return MlxShard(spec=spec, modules=modules, weights_bytes=weights_bytes, kv_group=group)


def _modules(
    checkpoint: Checkpoint, spec: StageSpec, family: Family, facts: MlxFacts
) -> tuple[StageModules, list[ModuleSource]]:
    """The stage's part of the whole model, and what is to be filled in it.

    Building the rest costs nothing: arrays are lazy, and never evaluated. That way each layer knows its absolute index,
    on which its kind and its rope can depend.
    """
    model = checkpoint.spec
    library = model_module(facts.module)
    windows = model.windows[spec.first : spec.last]
    experts = _NO_EXPERTS if family.experts is None else stacked_names(family.experts)
    parts: list[ModuleSource] = []

    def whole(sliding: bool) -> Any:  # An mlx-lm Model: the library is untyped.
        arguments = model_arguments(checkpoint.config, model, family, library.ModelArgs, sliding=sliding)
        return library.Model(arguments)

    def held(module: Any, prefix: str, experts: Mapping[str, str] = _NO_EXPERTS) -> Any:
        part = with_quantized_modules(
            ModuleSource(module=module, prefix=prefix, experts=experts), checkpoint.tensors, spec.device
        )
        parts.append(part)
        return part.module

    by_kind = {sliding: whole(sliding) for sliding in {window is not None for window in windows}}
    layers = [
        held(by_kind[window is not None].model.layers[i], f"model.layers.{i}.", experts)
        for i, window in enumerate(windows, start=spec.first)
    ]
    some = next(iter(by_kind.values()))
    tied_head = spec.is_last and model.tied_embeddings
    modules = StageModules(
        layers=layers,
        windows=windows,
        embed=held(some.model.embed_tokens, "model.embed_tokens.") if spec.is_first or tied_head else None,
        norm=held(some.model.norm, "model.norm.") if spec.is_last else None,
        lm_head=held(some.lm_head, "lm_head.") if spec.is_last and not tied_head else None,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        embed_scale=model.hidden_size**0.5 if family.scaled_embedding else None,
        softcap=checkpoint.config.get("final_logit_softcapping") if family.caps_logits and spec.is_last else None,
        array_masks=facts.array_masks,
        batched_decode=facts.batched_decode,
    )
    return modules, parts
