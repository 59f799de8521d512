"""What all layers of a step share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from shard.torch_backend.attention import RaggedStep
from shard.torch_backend.lean.rotary import RotaryTable


@dataclass(frozen=True, slots=True, kw_only=True)
class LeanStep:
    """A step's runs, decode entries first (rows [0, num_decode)), and the rotary tables, which hold all `positions`
    [tokens] of its rows."""

    ragged: RaggedStep
    num_decode: int
    positions: torch.Tensor
    tables: Mapping[str, RotaryTable]
    _angles: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _places: dict[str, Sequence[tuple[int, int]]] = field(default_factory=dict)

    def angles(self, rope: str) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin at the rows' positions, as `ops.rotate_` takes them."""
        found = self._angles.get(rope)
        if found is None:
            found = self._angles[rope] = self.tables[rope].angles(self.positions)
        return found

    def seats_of_angles(self, rope: str | None) -> Sequence[tuple[int, int]]:
        """For each decode row the addresses of its cosines and sines; zeros without a rotary embedding."""
        if rope is None:
            return [(0, 0)] * self.num_decode
        found = self._places.get(rope)
        if found is None:
            starts = [run.start for run in self.ragged.runs[: self.num_decode]]
            found = self._places[rope] = self.tables[rope].addresses(starts)
        return found
