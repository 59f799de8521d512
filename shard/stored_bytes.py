"""How a tensor of a checkpoint is held once it is loaded, and what it takes then."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shard.affine import AffineForm
from shard.checkpoint import TensorInfo
from shard.quantize import affine_form
from shard.torch_backend.lean.support import lean_reason
from shard.weight_blocks import BITS_ANEW, Backend, WeightBlock
from transport.messages import DType, WeightsForm


def weight_block(info: TensorInfo) -> WeightBlock:
    # Its group does not depend on the bits.
    anew = affine_form(info, BITS_ANEW["8-bit"]) if info.affine is None else None
    return WeightBlock(
        elements=math.prod(info.shape), affine=info.affine, anew_group=None if anew is None else anew.group
    )


def held_form(info: TensorInfo, weights: WeightsForm) -> AffineForm | None:
    """The quantized form that a stage holds the tensor in, None for dense."""
    return weight_block(info).held_as(weights)


def loaded_bytes(info: TensorInfo, backend: Backend, dtype: DType, weights: WeightsForm = "stored") -> int:
    """What the tensor takes on a stage that computes in `dtype`."""
    return weight_block(info).loaded_bytes(backend, dtype, weights)


def weights_on(
    backend: Backend, config: Mapping[str, Any], weights: WeightsForm, *, stacked_experts: bool
) -> WeightsForm:
    """What a backend makes of the wish: torch's library path knows dense matrices only. `stacked_experts`: see
    ModelSpec."""
    if backend == "torch" and lean_reason(config, stacked_experts=stacked_experts) is not None:
        return "dense"
    return weights
