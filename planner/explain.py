"""Why a plan is as it is: rows for tables and JSON, and why devices are left out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from devices.device import LeftOut
from planner.branch import solve
from planner.cost import CostModel
from planner.evaluate import Assignment, Objective, objective_s
from planner.limits import whole_pool
from planner.plan import Plan

_WORK = 3e8


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRow:
    """One stage. `layers` is half-open in `first` and `last`; `share` is its part of the stages' time of a token."""

    stage: int
    device: str
    backend: str
    compute_dtype: str
    first: int
    last: int
    num_layers: int
    weights_bytes: int
    kv_bytes: int
    memory_bytes: int
    predicted_ms_per_token: float
    hop_ms: float
    share: float


def stage_rows(plan: Plan) -> list[StageRow]:
    total_s = sum(stage.decode_s for stage in plan.stages)
    return [
        StageRow(
            stage=index,
            device=stage.device,
            backend=stage.backend,
            compute_dtype=stage.compute_dtype,
            first=stage.first,
            last=stage.last,
            num_layers=stage.num_layers,
            weights_bytes=stage.weights_bytes,
            kv_bytes=stage.kv_bytes,
            memory_bytes=stage.memory_bytes,
            predicted_ms_per_token=stage.decode_s * 1e3,
            hop_ms=stage.hop_s * 1e3,
            share=stage.decode_s / total_s if total_s else 0.0,
        )
        for index, stage in enumerate(plan.stages)
    ]


def why_left_out(costs: CostModel, assignment: Assignment, strategy: str) -> list[LeftOut]:
    """For each device without a stage: what the best ring with it would be like, of this ring's devices."""
    used = tuple(placed.device for placed in assignment)
    unused = [device for device in range(len(costs.pool.devices)) if device not in used]
    return [LeftOut(name=costs.name(device), reason=_reason(costs, assignment, device, strategy)) for device in unused]


def _reason(costs: CostModel, assignment: Assignment, device: int, strategy: str) -> str:
    if strategy not in ("auto", "latency", "throughput"):
        return f"its share by the rule {strategy!r} is less than a layer, or memory leaves it none"
    objective: Objective = strategy  # type: ignore[assignment]
    used = {placed.device for placed in assignment}
    limits = replace(whole_pool(costs, frozenset({device})), devices=tuple(sorted({*used, device})))
    found = solve(costs, objective, limits, work=_WORK)
    if found is None:
        return "there is no ring with it that fits and has links all the way round"
    now_s = objective_s(costs, assignment, objective)
    slower_s = found.objective_s - now_s
    if slower_s < 1e-3 * now_s:
        return "adding it would bring nothing"
    if objective == "latency":
        return f"adding it would make a token {slower_s * 1e3:.1f} ms slower"
    chats = costs.workload.concurrency
    whom = "one chat" if chats == 1 else f"{chats} chats"
    return (
        f"adding it would give {whom} {1 / found.objective_s:.1f} instead of {1 / now_s:.1f} tokens/s, prompts included"
    )
