"""A stage's module without its weights: the library's model class with only the stage's layers, nothing allocated."""

from __future__ import annotations

from typing import Any

import torch

from shard.stage import ShardSpec
from shard.torch_backend import attention
from shard.torch_backend.architectures import library_config, slice_config
from shard.torch_backend.dtypes import TORCH_DTYPES


def build_skeleton(config: dict[str, Any], spec: ShardSpec) -> tuple[Any, bool]:
    """A model for layers [first, last) with parameters on the meta device and real buffers, and whether it ties its
    embeddings. `Any`: a transformers ForCausalLM, whatever the family.

    What the stage lacks (embedding, final norm, head) is an identity.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    attention.register()
    full = library_config(config)
    # Buffers (rotary frequencies, Gemma's embedding scale) are in no checkpoint: they must be computed for real.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            slice_config(full, spec),
            dtype=TORCH_DTYPES[spec.compute_dtype],
            attn_implementation=attention.NAME,
            # The plain loop over experts: no copies of their weights, and no choice of kernel by who is in the batch.
            experts_implementation="eager",
            trust_remote_code=False,
        )
    if not spec.is_first:
        model.model.embed_tokens = torch.nn.Identity()
    if not spec.is_last:
        model.model.norm = torch.nn.Identity()
        model.lm_head = torch.nn.Identity()
    return model.eval(), bool(full.tie_word_embeddings)
