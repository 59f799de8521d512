"""Rotary angles of a step's positions, computed once for all layers that share them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shard.torch_backend.lean.config import Rope


class StepAngles:
    """Cosines and sines at `positions` int64 [tokens], in the dtype that layers compute in.

    Made anew for each step: a few operations, where a table of all positions of a long context would take as much
    memory as a layer.
    """

    def __init__(self, rope: Rope, positions: torch.Tensor, dtype: torch.dtype) -> None:
        angles = positions.to(torch.float32)[:, None] * rope.inverse_frequencies.to(positions.device)
        cos, sin = angles.cos(), angles.sin()
        if rope.scaling != 1.0:
            cos.mul_(rope.scaling)
            sin.mul_(rope.scaling)
        # [tokens, rotary_dim / 2]
        self._cos, self._sin = cos.to(dtype), sin.to(dtype)
        self._pairs: tuple[torch.Tensor, torch.Tensor] | None = None

    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [tokens, 1, 2, rotary_dim / 2] each, as `ops.rotate_` takes them."""
        if self._pairs is None:
            cos, sin = self._cos, self._sin
            self._pairs = torch.stack((cos, cos), dim=1)[:, None], torch.stack((-sin, sin), dim=1)[:, None]
        return self._pairs

    def addresses(self, num_rows: int) -> Sequence[tuple[int, int]]:
        """Where the cosines and sines of each of the first rows lie, [rotary_dim / 2] float32 each; valid as long as
        this object lives."""
        row_bytes = self._cos.shape[1] * self._cos.element_size()
        cos, sin = self.address(0)
        return [(cos + row * row_bytes, sin + row * row_bytes) for row in range(num_rows)]

    def address(self, row: int) -> tuple[int, int]:
        """Of one row; those of the next rows follow."""
        at = row * self._cos.shape[1] * self._cos.element_size()
        return self._cos.data_ptr() + at, self._sin.data_ptr() + at
