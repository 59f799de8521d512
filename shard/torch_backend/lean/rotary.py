"""Rotary angles by position, computed once for all layers that share them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shard.torch_backend.lean.config import Rope

_FIRST_POSITIONS = 512


class RotaryTable:
    """cos and sin of every position so far seen, grown to the next power of two."""

    def __init__(self, rope: Rope, device: torch.device, dtype: torch.dtype) -> None:
        self._rope = rope
        self._device = device
        self._dtype = dtype
        self._grow(_FIRST_POSITIONS)

    def reserve(self, end: int) -> None:
        """Have the angles of all positions below `end`."""
        if end > self._cos.shape[0]:
            self._grow(1 << (end - 1).bit_length())

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [tokens, 1, 2, rotary_dim / 2] each, as `ops.rotate_` takes them, at reserved `positions`
        [tokens]."""
        return self._cos[positions], self._sin[positions]

    def addresses(self, positions: Sequence[int]) -> list[tuple[int, int]]:
        """Where the cosines and sines of each position lie, [rotary_dim / 2] each, float32; the
        positions are reserved, and the addresses valid until more are."""
        row_bytes = self._cos.stride(0) * self._cos.element_size()
        half_bytes = row_bytes // 2
        cos, sin = self._cos.data_ptr(), self._sin.data_ptr() + half_bytes
        return [(cos + position * row_bytes, sin + position * row_bytes) for position in positions]

    def _grow(self, num_positions: int) -> None:
        positions = torch.arange(num_positions, dtype=torch.float32)[:, None]
        angles = positions * self._rope.inverse_frequencies
        cos, sin = angles.cos() * self._rope.scaling, angles.sin() * self._rope.scaling
        self._cos = torch.stack((cos, cos), dim=1)[:, None].to(self._device, self._dtype)
        self._sin = torch.stack((-sin, sin), dim=1)[:, None].to(self._device, self._dtype)
