"""Builds a stage on MLX: mlx-lm's model class, of which only this stage's layers ever get memory."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from shard.checkpoint import Checkpoint
from shard.mlx_backend.arguments import final_softcap, model_arguments
from shard.mlx_backend.families import Family, family_of
from shard.mlx_backend.library import model_module
from shard.mlx_backend.modules import StageModules
from shard.mlx_backend.shard import MlxShard
from shard.mlx_backend.weights import Part, Progress, fill
from shard.stage import ShardSpec
from transport.errors import DoesNotFit


def build(checkpoint: Checkpoint, spec: ShardSpec, progress: Progress = lambda done, total: None) -> MlxShard:
    """Load layers [spec.first, spec.last) and what the stage needs besides. `progress(read_bytes, total_bytes)`.

    Raises UnsupportedModel for an architecture or a feature that can't run here, BadCheckpoint for bad files,
    DoesNotFit where memory runs out.
    """
    family = family_of(checkpoint.config)
    if spec.device.endswith(":cpu"):
        mx.set_default_device(mx.cpu)
    modules = _modules(checkpoint, spec, family)
    parts = [
        Part(module=layer, prefix=f"model.layers.{spec.first + i}.", experts=family.experts)
        for i, layer in enumerate(modules.layers)
    ]
    if modules.embed is not None:
        parts.append(Part(module=modules.embed, prefix="model.embed_tokens.", experts={}))
    if modules.norm is not None:
        parts.append(Part(module=modules.norm, prefix="model.norm.", experts={}))
    if modules.head is not None:
        parts.append(Part(module=modules.head, prefix="lm_head.", experts={}))
    try:
        weights_bytes = fill(parts, checkpoint, spec.compute_dtype, progress)
    except (RuntimeError, MemoryError) as error:  # MLX reports allocation failures as RuntimeError
        raise DoesNotFit(
            f"{spec.device} has no memory left for layers [{spec.first}, {spec.last}): {error}",
            hint="give this device fewer layers, lower --context, or add another device",
        ) from error
    return MlxShard(spec=spec, modules=modules, weights_bytes=weights_bytes)


def _modules(checkpoint: Checkpoint, spec: ShardSpec, family: Family) -> StageModules:
    """The stage's part of the whole model. Building the rest costs nothing: arrays are lazy, and never evaluated.

    That way each layer knows its absolute index, on which its kind and its rope can depend.
    """
    model = checkpoint.spec
    library = model_module(family.module)
    windows = model.windows[spec.first : spec.last]

    def whole(sliding: bool) -> Any:  # An mlx-lm Model: the library is untyped.
        arguments = model_arguments(checkpoint.config, model, family, library.ModelArgs, sliding=sliding)
        return library.Model(arguments)

    by_kind = {sliding: whole(sliding) for sliding in {window is not None for window in windows}}
    layers = [by_kind[window is not None].model.layers[i] for i, window in enumerate(windows, start=spec.first)]
    some = next(iter(by_kind.values()))
    tied_head = spec.is_last and model.tied_embeddings
    head = some.lm_head if spec.is_last and not model.tied_embeddings else None
    return StageModules(
        layers=layers,
        windows=windows,
        embed=some.model.embed_tokens if spec.is_first or tied_head else None,
        norm=some.model.norm if spec.is_last else None,
        head=head,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        embed_scale=model.hidden_size**0.5 if family.scaled_embedding else None,
        softcap=final_softcap(checkpoint.config) if spec.is_last else None,
        array_masks=family.array_masks,
        batched_decode=family.batched_decode,
    )
