"""A plan in rows, for tables and JSON."""

from __future__ import annotations

from dataclasses import dataclass

from planner.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRow:
    """One stage. `layers` is half-open in `first` and `last`; `share` is its part of the predicted time of a token."""

    stage: int
    device: str
    backend: str
    compute_dtype: str
    first: int
    last: int
    num_layers: int
    weights_bytes: int
    kv_bytes: int
    predicted_ms_per_token: float
    share: float


def stage_rows(plan: Plan) -> list[StageRow]:
    total_s = sum(stage.predicted_s for stage in plan.stages)
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
            predicted_ms_per_token=stage.predicted_s * 1e3,
            share=stage.predicted_s / total_s,
        )
        for index, stage in enumerate(plan.stages)
    ]


def predicted_tokens_per_s(plan: Plan) -> float:
    """For one conversation, from reading weights alone: hops, KV and overheads only make it slower."""
    return 1.0 / sum(stage.predicted_s for stage in plan.stages)
