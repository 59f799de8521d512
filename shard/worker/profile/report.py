"""What a profile of one model on one device is requested with."""

from __future__ import annotations

from dataclasses import dataclass

from shard.formats.spec import Backend
from transport.messages.ring import DType, WeightsForm

BUDGET_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSettings:
    """`budget_s` is the time for measuring, after loading; `memory_bytes` what weights may take (None: no bound),
    `weights` how they are held. `dummy_weights`: random ones, of a model whose own need not be on this host."""

    backend: Backend
    device: str
    dtype: DType
    budget_s: float = BUDGET_S
    memory_bytes: int | None = None
    weights: WeightsForm = "stored"
    dummy_weights: bool = False
