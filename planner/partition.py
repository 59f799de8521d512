"""The simple rule: layers in proportion to measured bandwidth, as far as memory allows."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from devices.device import Device, LeftOut
from planner.cuts import best_spans
from planner.plan import Plan, StagePlan
from planner.profile import ModelProfile
from transport.errors import ConfigError, DoesNotFit
from transport.messages import DTYPE_BYTES, DType

GIB = 2**30

RUNTIME_RESERVE_BYTES = 512 * 2**20
"""For each worker: its interpreter and libraries (torch with transformers takes 350 MB), and a step's activations."""

_SMALLEST_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class _Demand:
    """What the ring must hold besides weights."""

    profile: ModelProfile
    context_tokens: int
    concurrency: int

    def kv_bytes(self, device: Device, first: int, last: int) -> int:
        return self.profile.kv_bytes(first, last, self.context_tokens, self.concurrency, device.compute_dtype)

    def memory_bytes(self, device: Device, first: int, last: int) -> int:
        weights_bytes = self.profile.weights_bytes(first, last, device.compute_dtype)
        return weights_bytes + self.kv_bytes(device, first, last) + RUNTIME_RESERVE_BYTES


def plan_proportional(
    profile: ModelProfile,
    devices: Sequence[Device],
    context_tokens: int,
    concurrency: int,
    *,
    use_all: bool = False,
    wire_dtype: DType | None = None,
) -> Plan:
    """Contiguous layers for the devices in the order given, so that all take about the same time for a token.

    A device's speed is in parameters per second: bandwidth over the bytes of its compute dtype, so that float32 halves
    it. The head counts as work on the last device, the embedding as memory on the first. Devices that share a memory
    pool hold together no more than the pool. A device whose share rounds to no layer is left out, with the reason,
    unless `use_all`; then as many devices as possible get at least one.
    `wire_dtype` None: what all stages compute in, else bfloat16.
    Raises DoesNotFit where no assignment fits, ConfigError for a context that the model does not have.
    """
    _check(profile, devices, context_tokens, concurrency)
    demand = _Demand(profile, context_tokens, concurrency)
    shares = _shares(profile, devices)
    spans = _spans(demand, devices, use_all=use_all)
    if spans is None:
        raise _does_not_fit(demand, devices)
    stages = [_stage(demand, device, span) for device, span in zip(devices, spans, strict=True) if span is not None]
    left_out = [
        LeftOut(name=device.name, reason=_why_left_out(demand, device, share))
        for device, span, share in zip(devices, spans, shares, strict=True)
        if span is None
    ]
    return Plan(
        stages=tuple(stages),
        wire_dtype=wire_dtype or _wire_dtype(stages),
        context_tokens=context_tokens,
        kv_capacity_tokens=context_tokens * concurrency,
        strategy="proportional",
        left_out=tuple(left_out),
    )


def _shares(profile: ModelProfile, devices: Sequence[Device]) -> list[float]:
    """Each device's part of the work, in parameters."""
    speeds = [_params_per_s(device) for device in devices]
    return [profile.work_params(0, profile.num_layers) * speed / sum(speeds) for speed in speeds]


def _params_per_s(device: Device) -> float:
    return device.bandwidth_bytes_per_s / DTYPE_BYTES[device.compute_dtype]


def _stage(demand: _Demand, device: Device, span: tuple[int, int]) -> StagePlan:
    first, last = span
    return StagePlan(
        device=device.name,
        backend=device.backend,
        first=first,
        last=last,
        compute_dtype=device.compute_dtype,
        weights_bytes=demand.profile.weights_bytes(first, last, device.compute_dtype),
        kv_bytes=demand.kv_bytes(device, first, last),
        predicted_s=demand.profile.work_params(first, last) / _params_per_s(device),
    )


def _wire_dtype(stages: Sequence[StagePlan]) -> DType:
    dtypes = {stage.compute_dtype for stage in stages}
    return dtypes.pop() if len(dtypes) == 1 else "bfloat16"


def _check(profile: ModelProfile, devices: Sequence[Device], context_tokens: int, concurrency: int) -> None:
    if not devices:
        raise DoesNotFit(f"no device can run {profile.name}", hint="see `potluck status` for why devices were left out")
    if not 1 <= context_tokens <= profile.context_tokens:
        raise ConfigError(
            f"{profile.name} has a context of {profile.context_tokens:,} tokens; {context_tokens:,} were asked for",
            hint=f"use --context with 1 to {profile.context_tokens}",
        )
    if concurrency < 1:
        raise ConfigError(f"{concurrency} conversations at once were asked for", hint="ask for at least 1")
    if len({device.name for device in devices}) != len(devices):
        raise ConfigError("two devices have the same name", hint="give each device a name of its own")


def _why_left_out(demand: _Demand, device: Device, share: float) -> str:
    profile = demand.profile
    ends = [0, *profile.legal_cuts, profile.num_layers]
    least = min(demand.memory_bytes(device, first, last) for first, last in itertools.pairwise(ends))
    if least > device.free_bytes:
        return (
            f"its {device.free_bytes / GIB:.2f} GiB can't hold one layer with its KV and runtime, {least / GIB:.2f} GiB"
        )
    part = share / profile.work_params(0, profile.num_layers)
    if part * profile.num_layers < 1:
        return f"it has {part:.1%} of the bandwidth, less than one of {profile.num_layers} layers is worth"
    return "the other devices hold all layers within the memory that is left"


def _does_not_fit(demand: _Demand, devices: Sequence[Device]) -> DoesNotFit:
    profile = demand.profile
    needed = _needed_bytes(demand, devices)
    available = _available_bytes(devices)
    what = f"{profile.name} needs {needed / GIB:.2f} GiB at {demand.context_tokens:,} tokens × {demand.concurrency}"
    offers = "1 device offers" if len(devices) == 1 else f"{len(devices)} devices offer"
    message = f"{what}; {offers} {available / GIB:.2f} GiB"
    if needed <= available:
        message += ", but no cut into stages fits each of them (every worker takes some for itself)"
    hint = "add another device, lower --context or --concurrency, or raise --memory"
    fitting = _largest_halved_context(demand, devices)
    return DoesNotFit(message, hint=f"--context {fitting} would fit; or {hint}" if fitting else hint)


def _spans(demand: _Demand, devices: Sequence[Device], *, use_all: bool) -> tuple[tuple[int, int] | None, ...] | None:
    if _needed_bytes(demand, devices) > _available_bytes(devices):
        return None  # No need to search.
    shares = _shares(demand.profile, devices)
    return best_spans(demand.profile, devices, shares, demand.memory_bytes, use_all=use_all)


def _needed_bytes(demand: _Demand, devices: Sequence[Device]) -> int:
    """The least that the model takes: all of it in one worker of the most compact dtype."""
    most_compact = min(devices, key=lambda device: DTYPE_BYTES[device.compute_dtype])
    return demand.memory_bytes(most_compact, 0, demand.profile.num_layers)


def _available_bytes(devices: Sequence[Device]) -> int:
    by_pool: dict[str, list[Device]] = defaultdict(list)
    for device in devices:
        by_pool[device.memory_pool].append(device)
    return sum(
        min(sum(device.free_bytes for device in members), min(device.total_bytes for device in members))
        for members in by_pool.values()
    )


def _largest_halved_context(demand: _Demand, devices: Sequence[Device]) -> int | None:
    """The first of context/2, /4, … that fits."""
    context_tokens = demand.context_tokens // 2
    while context_tokens >= _SMALLEST_CONTEXT:
        smaller = _Demand(demand.profile, context_tokens, demand.concurrency)
        if _spans(smaller, devices, use_all=False) is not None:
            return context_tokens
        context_tokens //= 2
    return None
