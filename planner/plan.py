"""A plan says which device runs which layers, in what precision, and what that takes and gives."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from devices.hardware.device import UnavailableDevice
from planner.cost import Assignment, CostModel, Prediction, slowdown_factors
from planner.measurements import StageTimes
from transport.messages.ring import DType, KVForm, StageSpec, WeightsForm

_DECODE_SEQUENCES = (1, 2, 4, 8, 16, 32)
_CHUNK_TOKENS = (8, 16, 32, 64, 128, 256, 512)
_CONTEXT_QUARTERS = (0, 1, 2, 4)


def stage_times(costs: CostModel, assignment: Assignment) -> tuple[StageTimes, ...]:
    """Each stage's, while the others of the ring work too. Decode steps read the KV of the workload's usual context;
    chunks ask for no logits."""
    context = costs.workload.context_tokens
    befores = sorted({context * quarters // 4 for quarters in _CONTEXT_QUARTERS})
    slow = slowdown_factors(costs, assignment, busy=True)

    def of(device: int, first: int, last: int, factor: float) -> StageTimes:
        return StageTimes(
            decode=tuple(
                (group, factor * costs.decode(device, group).span_s(first, last)) for group in _DECODE_SEQUENCES
            ),
            prefill=tuple(
                (tokens, before, factor * costs.chunk(device, tokens, before, is_last=False).span_s(first, last))
                for tokens in _CHUNK_TOKENS
                for before in befores
            ),
        )

    return tuple(
        of(placed.device, placed.first, placed.last, factor) for placed, factor in zip(assignment, slow, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """What the device called `device` runs.

    `memory_bytes` is weights, KV for all sequences, and the worker's reserve. `decode_s` is predicted for a decode
    step of one sequence, `group_decode_s` for one of the plan's group while the other stages work too; `hop_s` is the
    hop into this stage.
    """

    device: str
    backend: str
    spec: StageSpec
    weights_bytes: int
    kv_bytes: int
    memory_bytes: int
    decode_s: float
    group_decode_s: float
    hop_s: float

    @property
    def first(self) -> int:
        return self.spec.first

    @property
    def last(self) -> int:
        return self.spec.last

    @property
    def num_layers(self) -> int:
        return self.last - self.first

    @property
    def compute_dtype(self) -> DType:
        return self.spec.compute_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Another way to use devices, and its decode rates for one chat and for the workload's."""

    what: str
    tokens_per_s: float
    tokens_per_s_many: float
    ttft_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """`binding`: what limits this plan. `best_single`: the best device that holds the model alone, if one does.

    `replicas`: two rings beside each other, where they would serve the workload's chats faster than this plan.
    `one_more`: this plan's objective with another device.
    """

    binding: str
    best_single: Alternative | None
    replicas: Alternative | None
    one_more: Alternative | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Stages in ring order, their matrices in the form `weights`, their KV in the form `kv`. `context_tokens` bounds
    the KV of one sequence, `kv_capacity_tokens` that of all.

    `times` are each stage's, for the scheduler. `is_exact`: no ring has a better predicted objective (strategy latency,
    throughput or auto).
    """

    stages: tuple[StagePlan, ...]
    wire_dtype: DType
    context_tokens: int
    kv_capacity_tokens: int
    strategy: str
    prediction: Prediction
    weights: WeightsForm = "stored"
    kv: KVForm = "full"
    times: tuple[StageTimes, ...] = ()
    left_out: tuple[UnavailableDevice, ...] = ()
    is_exact: bool = False
    advice: Advice | None = None

    @property
    def id(self) -> str:
        """The same for the same work on the same devices, whatever was predicted of it."""
        facts = [
            [[stage.device, stage.backend, stage.first, stage.last, stage.compute_dtype] for stage in self.stages],
            [self.wire_dtype, self.context_tokens, self.kv_capacity_tokens, self.strategy, self.weights, self.kv],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
