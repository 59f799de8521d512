"""The planner's entry point turns measurements and options into a plan."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from devices.hardware.device import Device, UnavailableDevice
from planner.cost import Assignment, CostModel, Objective, PlacedStage, objective_s, predict, slowdown_factors
from planner.exact import Solution, solve_exactly
from planner.explain import why_left_out
from planner.feasible import GIB, check_request, feasible_devices
from planner.heuristic import find_best_ring
from planner.measurements import PoolTimes
from planner.memory import QUANTIZE_OPTION, MemoryModel, ModelProfile, available_bytes, smaller_forms
from planner.options import LayerCounts, Strategy, Workload
from planner.plan import Plan, StagePlan, stage_times
from planner.problem import whole_pool
from planner.relaxation import SearchProgress
from planner.split import Rule, follow_rule, place_by_hand
from transport.errors import ConfigError, DoesNotFit
from transport.messages.ring import DTYPE_BYTES, DType, StageSpec

_SMALLEST_CONTEXT = 256
_MOST_CHOICES = 64


def make_plan(
    profile: ModelProfile,
    pool: PoolTimes,
    workload: Workload,
    objective: Strategy = "auto",
    *,
    layers: LayerCounts | None = None,
    use_all: bool = False,
    wire_dtype: DType | None = None,
    progress: SearchProgress | None = None,
) -> Plan:
    """The best ring for the objective, or the one that `layers` says.

    `use_all`: as many devices as possible get a stage. Devices that can't take part are left out, with the reason.
    Raises DoesNotFit where no assignment fits, ConfigError for what contradicts the model or the pool.
    """
    _check_workload(workload)
    demand = MemoryModel(profile, workload.context_tokens, workload.concurrency)
    check_request(pool, demand)
    if layers is not None:
        costs = CostModel(profile, pool, workload, wire_dtype)
        unused = {times.device.name for times in pool.devices} - {name for name, _ in layers}
        left_out = [UnavailableDevice(name=name, reason="--layers gives it none") for name in sorted(unused)]
        return build_plan(costs, place_by_hand(costs, layers), "manual", left_out)
    kept, left_out = feasible_devices(pool, demand)
    if not kept.devices:
        raise does_not_fit(profile, pool, workload, left_out)
    costs = CostModel(profile, kept, workload, wire_dtype)
    if objective == "auto" or objective == "latency" or objective == "throughput":
        found = solve_objective(costs, objective, use_all=use_all, progress=progress)
    else:
        found = _solve_by_rule(costs, objective, use_all=use_all)
    if found is None:
        raise does_not_fit(profile, pool, workload, left_out)
    left_out += why_left_out(costs, found.assignment, objective)
    return build_plan(costs, found.assignment, objective, left_out, is_exact=found.is_exact)


def solve_objective(
    costs: CostModel, objective: Objective, *, use_all: bool = False, progress: SearchProgress | None = None
) -> Solution | None:
    """The best ring; with `use_all` the best one of as many devices as possible."""
    if not use_all:
        return find_best_ring(costs, objective, progress)
    devices = range(len(costs.pool.devices))
    for count in range(min(len(devices), costs.profile.num_layers), 0, -1):
        best: Solution | None = None
        for chosen in itertools.islice(itertools.combinations(devices, count), _MOST_CHOICES):
            limits = replace(whole_pool(costs, frozenset(chosen)), devices=chosen)
            found = solve_exactly(costs, objective, limits, progress=progress)
            if found is not None and (best is None or found.objective_s < best.objective_s):
                best = found
        if best is not None:
            return best
    return None


def build_plan(
    costs: CostModel,
    assignment: Assignment,
    strategy: str,
    left_out: Sequence[UnavailableDevice],
    *,
    is_exact: bool = False,
) -> Plan:
    prediction = predict(costs, assignment)
    slow = slowdown_factors(costs, assignment, busy=prediction.num_groups > 1)
    stages = []
    for index, placed in enumerate(assignment):
        device = costs.pool.devices[placed.device].device
        span = placed.first, placed.last
        group_s = slow[index] * costs.decode(placed.device, prediction.group_size).span_s(*span)
        stages.append(
            StagePlan(
                device=device.name,
                backend=device.backend,
                spec=stage_spec(costs, device, placed),
                weights_bytes=costs.memory_model.weights_bytes(device, *span),
                kv_bytes=costs.memory_model.kv_bytes(device, *span),
                memory_bytes=costs.memory_model.memory_bytes(device, *span),
                decode_s=prediction.decode_s[index],
                group_decode_s=group_s,
                hop_s=prediction.hops_s[index],
            )
        )
    return Plan(
        stages=tuple(stages),
        wire_dtype=costs.wire_dtype,
        context_tokens=costs.workload.context_tokens,
        kv_capacity_tokens=costs.workload.context_tokens * costs.workload.concurrency,
        strategy=strategy,
        prediction=prediction,
        weights=costs.profile.weights,
        kv=costs.profile.kv,
        times=stage_times(costs, assignment),
        left_out=tuple(left_out),
        is_exact=is_exact,
    )


def stage_spec(costs: CostModel, device: Device, placed: PlacedStage) -> StageSpec:
    return StageSpec(
        first=placed.first,
        last=placed.last,
        num_layers=costs.profile.num_layers,
        device=device.kind,
        compute_dtype=device.compute_dtype,
        wire_dtype=costs.wire_dtype,
        next_dtype=costs.wire_dtype,
        context_tokens=costs.workload.context_tokens,
        kv_capacity_tokens=costs.workload.context_tokens * costs.workload.concurrency,
        weights=costs.profile.weights,
        kv=costs.profile.kv,
    )


def does_not_fit(
    profile: ModelProfile, pool: PoolTimes, workload: Workload, left_out: Sequence[UnavailableDevice]
) -> DoesNotFit:
    demand = MemoryModel(profile, workload.context_tokens, workload.concurrency)
    devices = [times.device for times in pool.devices]
    compact = min(devices, key=lambda device: DTYPE_BYTES[device.compute_dtype])
    needed, available = demand.memory_bytes(compact, 0, profile.num_layers), available_bytes(devices)
    what = f"{profile.name} needs {needed / GIB:.2f} GiB at {demand.context_tokens:,} tokens × {demand.concurrency}"
    offers = "1 device offers" if len(devices) == 1 else f"{len(devices)} devices offer"
    message = f"{what}; {offers} {available / GIB:.2f} GiB"
    if needed <= available:
        message += ", but no cut into stages fits each of them (every worker takes some for itself)"
    message += "".join(f"; {item.name} is left out: {item.reason}" for item in left_out)
    hints = ["add another device, lower --context or --concurrency, or raise --memory"]
    fitting = _largest_halved_context(profile, pool, workload)
    if fitting is not None:
        hints.insert(0, f"--context {fitting} would fit")
    in_8_bits = replace(profile, kv="8-bit")
    can_hold_it = all(device.backend == "mlx" or device.kind == "cpu" for device in devices)
    if (
        profile.kv == "full"
        and profile.head_dim is not None
        and can_hold_it
        and any_ring_fits(in_8_bits, pool, workload)
    ):
        hints.insert(0, "--kv-cache 8-bit would fit")
    found = next((form for form in smaller_forms(profile) if any_ring_fits(form, pool, workload)), None)
    if found is not None:
        taken = replace(demand, profile=found).memory_bytes(compact, 0, profile.num_layers)
        hints.insert(0, f"--quantize {QUANTIZE_OPTION[found.weights]} would fit, with {taken / GIB:.2f} GiB")
    return DoesNotFit(message, hint="; or ".join(hints))


def any_ring_fits(profile: ModelProfile, pool: PoolTimes, workload: Workload) -> bool:
    """Whether there is any ring at all."""
    kept, _ = feasible_devices(pool, MemoryModel(profile, workload.context_tokens, workload.concurrency))
    return bool(kept.devices) and solve_objective(CostModel(profile, kept, workload), "latency") is not None


def _solve_by_rule(costs: CostModel, rule: Rule, *, use_all: bool) -> Solution | None:
    assignment = follow_rule(costs, rule, use_all=use_all)
    if assignment is None:
        return None
    total_s = objective_s(costs, assignment, "latency")
    return Solution(total_s, assignment, False) if total_s < float("inf") else None


def _largest_halved_context(profile: ModelProfile, pool: PoolTimes, workload: Workload) -> int | None:
    """The first of context/2, /4, … that fits."""
    context_tokens = workload.context_tokens // 2
    while context_tokens >= _SMALLEST_CONTEXT:
        if any_ring_fits(profile, pool, replace(workload, context_tokens=context_tokens)):
            return context_tokens
        context_tokens //= 2
    return None


def _check_workload(workload: Workload) -> None:
    for name, value in (("prompt", workload.prompt_tokens), ("output", workload.output_tokens)):
        if value < 1:
            raise ConfigError(f"{name} is {value} tokens; it must be at least 1", hint=f"leave --{name} out")
