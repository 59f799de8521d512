"""What all layers of a step share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from shard.torch_backend.attention import RaggedStep
from shard.torch_backend.lean.config import Rope
from shard.torch_backend.lean.rotary import StepAngles


@dataclass(frozen=True, slots=True, kw_only=True)
class LeanStep:
    """A step's runs, decode entries first (rows [0, num_decode)), the `positions` int64 [tokens] of its rows, the
    model's rotary embeddings by name, and the dtype of the residual stream."""

    ragged: RaggedStep
    num_decode: int
    positions: torch.Tensor
    ropes: Mapping[str, Rope]
    dtype: torch.dtype
    _angles: dict[str, StepAngles] = field(default_factory=dict)
    _places: dict[str, Sequence[tuple[int, int]]] = field(default_factory=dict)

    def angles(self, rope: str) -> StepAngles:
        """At the rows' positions."""
        found = self._angles.get(rope)
        if found is None:
            found = self._angles[rope] = StepAngles(self.ropes[rope], self.positions, self.dtype)
        return found

    def places_of_angles(self, rope: str | None) -> Sequence[tuple[int, int]]:
        """For each decode row the addresses of its cosines and sines; zeros without a rotary embedding."""
        if rope is None:
            return [(0, 0)] * self.num_decode
        found = self._places.get(rope)
        if found is None:
            found = self._places[rope] = self.angles(rope).addresses(self.num_decode)
        return found
