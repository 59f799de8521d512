"""What a ring's stages did between two looks at its status, and what they could do at best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from planner.profile import ModelProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class StageUse:
    """Shares of the time. `idle`: other stages computed, or nobody did; `wire` is the ring's, the same for all its
    stages: hops, the engine and HTTP. It can be told from idling for one chat only, when nothing overlaps.
    `decode_step_s` is the mean decode step, and `ratio` how many times slower than planned such steps have been."""

    device: str
    first: int
    last: int
    compute: float
    wire: float | None
    idle: float
    decode_step_s: float
    ratio: float


def stage_uses(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], wall_s: float, *, concurrency: int
) -> list[StageUse]:
    """`before` and `after` are the stages of two status reports of the same ring."""
    compute = [
        (new["decode_s"] + new["prefill_s"] - old["decode_s"] - old["prefill_s"]) / wall_s
        for old, new in zip(before, after, strict=True)
    ]
    wire = max(0.0, 1.0 - sum(compute)) if concurrency == 1 else None
    return [
        StageUse(
            device=new["device"],
            first=new["first"],
            last=new["last"],
            compute=share,
            wire=wire,
            idle=max(0.0, 1.0 - share - (wire or 0.0)),
            decode_step_s=_decode_step_s(old, new),
            ratio=new["ratio"],
        )
        for old, new, share in zip(before, after, compute, strict=True)
    ]


def _decode_step_s(old: dict[str, Any], new: dict[str, Any]) -> float:
    steps = new["decode_steps"] - old["decode_steps"]
    return float((new["decode_s"] - old["decode_s"]) / steps) if steps else 0.0


def bandwidth_bound_tokens_per_s(profile: ModelProfile, stages: Sequence[dict[str, Any]], concurrency: int) -> float:
    """What reading the weights allows at the devices' measured bandwidths: no hops, no KV, no arithmetic.

    A device's bandwidth is that while its host's other devices work too: one chat in a ring over several devices of one
    host can go beyond it. One chat visits the stages one after another; many go in as many groups as there are stages,
    and a step reads a stage's weights once for its whole group.
    """
    times_s = [_read_s(profile, stage) for stage in stages]
    group = -(-concurrency // min(concurrency, len(stages)))
    return min(concurrency / sum(times_s), group / max(times_s))


def _read_s(profile: ModelProfile, stage: dict[str, Any]) -> float:
    read_bytes = profile.work_bytes(stage["first"], stage["last"], stage["backend"], stage["dtype"])
    return float(read_bytes / stage["bandwidth_bytes_per_s"])
