"""Simple rules, kept for comparison: layers in proportion to something, in the order given, as far as memory allows."""

from __future__ import annotations

from typing import Literal

from planner.cost import CostModel
from planner.cuts import best_spans
from planner.evaluate import Assignment, Placed

Rule = Literal["proportional", "memory", "even"]


def follow_rule(costs: CostModel, rule: Rule, *, use_all: bool) -> Assignment | None:
    """None if no cut fits. A device whose share rounds to no layer is left out unless `use_all`.

    proportional: to decode steps a second, from bandwidth and what the weights take on the device. memory: to free
    memory, as exo and others do. even: as many layers each.
    """
    devices = [times.device for times in costs.pool.devices]
    profile = costs.profile
    works = [profile.work_bytes(0, profile.num_layers, device.backend, device.compute_dtype) for device in devices]
    if rule == "proportional":
        parts = [device.bandwidth_bytes_per_s / work for device, work in zip(devices, works, strict=True)]
    else:
        parts = [float(device.free_bytes) if rule == "memory" else 1.0 for device in devices]
    shares = [work * part / sum(parts) for work, part in zip(works, parts, strict=True)]
    spans = best_spans(costs.profile, devices, shares, costs.demand.memory_bytes, use_all=use_all)
    if spans is None:
        return None
    return tuple(Placed(number, *span) for number, span in enumerate(spans) if span is not None)
