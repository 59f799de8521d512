"""Explanations say why a plan is as it is, what limits it, and what else these devices could do."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any, cast, get_args

from devices.hardware.device import UnavailableDevice
from planner.cost import Assignment, CostModel, Objective, PlacedStage, fits, objective_s, predict
from planner.exact import Solution, solve_exactly
from planner.feasible import GIB, feasible_devices
from planner.heuristic import find_best_ring
from planner.measurements import OTHER_HOST, DeviceTimes, LinkTimes, PoolTimes
from planner.memory import MemoryModel, ModelProfile
from planner.options import Workload
from planner.plan import Advice, Alternative, Plan
from planner.problem import whole_pool
from planner.relaxation import SearchProgress

_LEFT_OUT_WORK = 3e8
_PLACED = ("device", "backend", "compute_dtype", "first", "last", "num_layers")
_STAGE_FACTS = (*_PLACED, "weights_bytes", "kv_bytes", "memory_bytes")


def stage_rows(plan: Plan) -> list[dict[str, Any]]:
    """Each stage as `potluck plan --json` prints it; `share` is its part of the stages' time of a token."""
    total_s = sum(stage.decode_s for stage in plan.stages)
    return [
        {
            "stage": index,
            **{name: getattr(stage, name) for name in _STAGE_FACTS},
            "predicted_ms_per_token": stage.decode_s * 1e3,
            "hop_ms": stage.hop_s * 1e3,
            "share": stage.decode_s / total_s if total_s else 0.0,
        }
        for index, stage in enumerate(plan.stages)
    ]


def why_left_out(costs: CostModel, assignment: Assignment, strategy: str) -> list[UnavailableDevice]:
    """For each device without a stage: what the best ring with it would be like, of this ring's devices."""
    used = tuple(placed.device for placed in assignment)
    unused = [device for device in range(len(costs.pool.devices)) if device not in used]
    return [
        UnavailableDevice(name=costs.name(device), reason=_reason_left_out(costs, assignment, device, strategy))
        for device in unused
    ]


def _reason_left_out(costs: CostModel, assignment: Assignment, device: int, strategy: str) -> str:
    if strategy not in ("auto", "latency", "throughput"):
        return f"its share by the rule {strategy!r} is less than a layer, or memory leaves it none"
    objective: Objective = strategy  # type: ignore[assignment]
    used = {placed.device for placed in assignment}
    limits = replace(whole_pool(costs, frozenset({device})), devices=tuple(sorted({*used, device})))
    found = solve_exactly(costs, objective, limits, work=_LEFT_OUT_WORK)
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


_MIN_GAIN = 1.02
"""What brings less than this is not worth a word."""


def with_advice(
    profile: ModelProfile, pool: PoolTimes, workload: Workload, plan: Plan, progress: SearchProgress | None = None
) -> Plan:
    """The plan with its advice. For a plan by a rule or by hand, what else there is is reckoned as `auto`."""
    by_rule = plan.strategy not in get_args(Objective)
    objective: Objective = "auto" if by_rule else cast(Objective, plan.strategy)
    kept, _ = feasible_devices(pool, MemoryModel(profile, workload.context_tokens, workload.concurrency))
    costs = CostModel(profile, kept, workload, plan.wire_dtype)
    names = [times.device.name for times in kept.devices]
    assignment = tuple(PlacedStage(names.index(stage.device), stage.first, stage.last) for stage in plan.stages)
    advice = Advice(
        binding=plan.prediction.limit if by_rule else _binding_limit(costs, assignment, objective, progress),
        best_single=_best_single(costs, objective),
        replicas=None if by_rule else _replicas(costs, assignment, objective, progress),
        one_more=_one_more(costs, assignment, objective, progress),
    )
    return replace(plan, advice=advice)


def _alternative(what: str, costs: CostModel, assignment: Assignment) -> Alternative:
    found = predict(costs, assignment)
    return Alternative(
        what=what,
        tokens_per_s=found.tokens_per_s,
        tokens_per_s_many=found.tokens_per_s_many,
        ttft_s=found.ttft_s,
    )


def _best_single(costs: CostModel, objective: Objective) -> Alternative | None:
    num_layers = costs.profile.num_layers
    alone = [(PlacedStage(device, 0, num_layers),) for device in range(len(costs.pool.devices))]
    timed = [(objective_s(costs, each, objective), each) for each in alone]
    best_s, best = min(timed, key=lambda pair: pair[0])
    return _alternative(costs.name(best[0].device), costs, best) if best_s < float("inf") else None


def _one_more(
    costs: CostModel, assignment: Assignment, objective: Objective, progress: SearchProgress | None
) -> Alternative | None:
    """Another one of the fastest device in use, on a host of its own, with links like those between the hosts."""
    num_layers = costs.profile.num_layers
    fastest = min(
        (placed.device for placed in assignment), key=lambda device: costs.decode(device, 1).span_s(0, num_layers)
    )
    pool = with_device(costs.pool, _copy_of(costs.pool.devices[fastest]))
    more = CostModel(costs.profile, pool, costs.workload, costs.wire_dtype)
    found = find_best_ring(more, objective, progress)
    if found is None:
        return None
    now_s = objective_s(costs, assignment, objective)
    what = f"another {costs.name(fastest)}"
    better = now_s > found.objective_s * _MIN_GAIN
    return _alternative(what, more, found.assignment if better else assignment)


def _copy_of(times: DeviceTimes) -> DeviceTimes:
    name = f"another {times.device.name}"
    device = replace(times.device, name=name, host=name, memory_pool=name, total_bytes=times.device.free_bytes)
    return replace(times, device=device, busy=1.0)


def with_device(
    pool: PoolTimes, times: DeviceTimes, hop_s: float | None = None, bytes_per_s: float | None = None
) -> PoolTimes:
    """The pool with a device on a host of its own; its links are the median ones between hosts unless given."""
    host = times.device.host
    between = [link for link in pool.links if link.source != link.target]
    hop_s = hop_s or (median(link.hop_s for link in between) if between else OTHER_HOST[0])
    rate = bytes_per_s or (median(link.bytes_per_s for link in between) if between else OTHER_HOST[1])
    hosts = dict.fromkeys([pool.head, *(link.source for link in pool.links)])
    ways = [(host, host), *((host, other) for other in hosts), *((other, host) for other in hosts)]
    links = [
        LinkTimes(source=source, target=target, hop_s=hop_s, hop_p95_s=2 * hop_s, bytes_per_s=rate)
        for source, target in ways
    ]
    return replace(pool, devices=(*pool.devices, times), links=(*pool.links, *links))


def _replicas(
    costs: CostModel, assignment: Assignment, objective: Objective, progress: SearchProgress | None
) -> Alternative | None:
    """Two rings with half of the chats each, if they serve more than this plan.

    Looked at: each device that holds the model alone beside the best ring of the others, and the devices dealt out in
    turn by speed. Devices that share memory stay together.
    """
    if costs.workload.concurrency < 2 or len(costs.pool.devices) < 2 or objective == "latency":
        return None
    half = replace(costs.workload, concurrency=-(-costs.workload.concurrency // 2))
    halved = CostModel(costs.profile, costs.pool, half, costs.wire_dtype)
    best: tuple[float, Solution, Solution] | None = None
    for ring in _first_rings(halved):
        pools = {costs.pool_of[device] for device in ring}
        rest = tuple(device for device in range(len(costs.pool.devices)) if costs.pool_of[device] not in pools)
        if not rest:
            continue
        one, other = _best_ring_of(halved, ring, objective, progress), _best_ring_of(halved, rest, objective, progress)
        if one is not None and other is not None:
            rate = 1 / one.objective_s + 1 / other.objective_s
            best = max(best or (0.0, one, other), (rate, one, other), key=lambda found: found[0])
    if best is None or best[0] * objective_s(costs, assignment, objective) < _MIN_GAIN:
        return None
    rings = [predict(halved, solution.assignment) for solution in best[1:]]
    names = [" + ".join(costs.name(placed.device) for placed in solution.assignment) for solution in best[1:]]
    return Alternative(
        what=" beside ".join(names),
        tokens_per_s=max(ring.tokens_per_s for ring in rings),
        tokens_per_s_many=sum(ring.tokens_per_s_many for ring in rings),
        ttft_s=max(ring.ttft_s for ring in rings),
    )


def _first_rings(costs: CostModel) -> list[tuple[int, ...]]:
    num_layers = costs.profile.num_layers
    devices = range(len(costs.pool.devices))
    alone = [(device,) for device in devices if fits(costs, (PlacedStage(device, 0, num_layers),))]
    by_speed = sorted(devices, key=lambda device: costs.decode(device, 1).span_s(0, num_layers))
    return [*alone, tuple(sorted(by_speed[::2]))]


def _best_ring_of(
    costs: CostModel, devices: tuple[int, ...], objective: Objective, progress: SearchProgress | None
) -> Solution | None:
    """As if there were no others; numbers of devices stay those of the pool."""
    return find_best_ring(costs, objective, progress, devices=devices)


def _binding_limit(
    costs: CostModel, assignment: Assignment, objective: Objective, progress: SearchProgress | None
) -> str:
    """Memory, where more of one device's would help; else what takes the most time."""
    now_s = objective_s(costs, assignment, objective)
    best: tuple[float, PlacedStage] | None = None
    for placed in assignment:
        if not _is_full(costs, placed):
            continue
        found = find_best_ring(_with_memory(costs, placed.device), objective, progress)
        if found is not None and now_s > found.objective_s * _MIN_GAIN:
            best = min(best or (now_s, placed), (found.objective_s, placed), key=lambda pair: pair[0])
    if best is not None:
        better_s, placed = best
        have = costs.free_bytes(placed.device) / GIB
        gain = now_s / better_s - 1
        return f"the memory of {costs.name(placed.device)}: with more than its {have:.1f} GiB, {gain:.0%} more tokens/s"
    prediction = predict(costs, assignment)
    if objective != "latency":
        return prediction.limit
    hops_s, slowest_s = sum(prediction.hops_s), max(prediction.decode_s)
    if hops_s > slowest_s:
        return f"hops: {hops_s * 1e3:.1f} of {prediction.token_s * 1e3:.1f} ms a token"
    name = costs.name(assignment[prediction.decode_s.index(slowest_s)].device)
    return f"the speed of {name}: {slowest_s * 1e3:.1f} of {prediction.token_s * 1e3:.1f} ms a token"


def _is_full(costs: CostModel, placed: PlacedStage) -> bool:
    """It can't hold one more layer than its own."""
    ends = (0, *costs.profile.legal_cuts, costs.profile.num_layers)
    first, last = ends.index(placed.first), ends.index(placed.last)
    wider = [(first - 1, last)] if first else []
    wider += [(first, last + 1)] if last + 1 < len(ends) else []
    room = min(costs.free_bytes(placed.device), costs.pool_total_bytes[costs.pool_of[placed.device]])
    return any(costs.memory_bytes(placed.device, ends[low], ends[high]) > room for low, high in wider)


def _with_memory(costs: CostModel, device: int) -> CostModel:
    needed = costs.memory_bytes(device, 0, costs.profile.num_layers)
    pool = costs.pool_of[device]
    total = costs.pool_total_bytes[pool] + needed
    devices = []
    for number, times in enumerate(costs.pool.devices):
        facts = times.device
        if number == device:
            facts = replace(facts, free_bytes=facts.free_bytes + needed)
        if costs.pool_of[number] == pool:
            facts = replace(facts, total_bytes=total)
        devices.append(replace(times, device=facts))
    return CostModel(costs.profile, replace(costs.pool, devices=tuple(devices)), costs.workload, costs.wire_dtype)
