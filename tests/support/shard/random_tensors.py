"""Random tensors, and the rotary embedding in plain torch."""

from __future__ import annotations

import numpy as np
import torch


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    half = angles.shape[-1]
    a, b, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=1)
