"""Simple rules, kept for comparison: layers in proportion to something, in the order given, as far as memory allows."""

from __future__ import annotations

from typing import Literal

from planner.cost import CostModel
from planner.cuts import best_spans
from planner.evaluate import Assignment, Placed
from transport.messages import DTYPE_BYTES

Rule = Literal["proportional", "memory", "even"]


def follow_rule(costs: CostModel, rule: Rule, *, use_all: bool) -> Assignment | None:
    """None if no cut fits. A device whose share rounds to no layer is left out unless `use_all`.

    proportional: to parameters a second, from bandwidth and the bytes of the compute dtype. memory: to free memory,
    as exo and others do. even: as many layers each.
    """
    devices = [times.device for times in costs.pool.devices]
    if rule == "proportional":
        parts = [device.bandwidth_bytes_per_s / DTYPE_BYTES[device.compute_dtype] for device in devices]
    else:
        parts = [float(device.free_bytes) if rule == "memory" else 1.0 for device in devices]
    work = costs.profile.work_params(0, costs.profile.num_layers)
    shares = [work * part / sum(parts) for part in parts]
    spans = best_spans(costs.profile, devices, shares, costs.demand.memory_bytes, use_all=use_all)
    if spans is None:
        return None
    return tuple(Placed(number, *span) for number, span in enumerate(spans) if span is not None)
