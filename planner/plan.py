"""A plan: which device runs which layers, in what precision, and what that takes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from devices.device import LeftOut
from transport.messages import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """Layers [first, last) on the device called `device`. `predicted_s` is the time of one decode token, from the
    weights it reads and the device's measured bandwidth."""

    device: str
    backend: str
    first: int
    last: int
    compute_dtype: DType
    weights_bytes: int
    kv_bytes: int
    predicted_s: float

    @property
    def num_layers(self) -> int:
        return self.last - self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Stages in ring order. `context_tokens` bounds the KV of one sequence, `kv_capacity_tokens` that of all."""

    stages: tuple[StagePlan, ...]
    wire_dtype: DType
    context_tokens: int
    kv_capacity_tokens: int
    strategy: str
    left_out: tuple[LeftOut, ...] = ()

    @property
    def id(self) -> str:
        """The same for the same work on the same devices, whatever was predicted of it."""
        facts = [
            [[stage.device, stage.backend, stage.first, stage.last, stage.compute_dtype] for stage in self.stages],
            [self.wire_dtype, self.context_tokens, self.kv_capacity_tokens, self.strategy],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, **asdict(self)}
