"""Builds a stage on MLX: mlx-lm's model class, of which only this stage's layers ever get memory."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import mlx.core as mx

from shard.formats.checkpoint import Checkpoint
from shard.formats.families import Family, MlxFacts, family_of
from shard.mlx_backend.kv import kv_group_size
from shard.mlx_backend.library import mlx_facts, model_arguments, model_module, stacked_names
from shard.mlx_backend.modules import StageModules, use_cpu_kernels
from shard.mlx_backend.shard import MlxShard
from shard.mlx_backend.weights import ModuleSource, Progress, load_weights, with_quantized_modules
from shard.stage import StageSpec
from transport.errors import DoesNotFit

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
