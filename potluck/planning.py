"""From a model of the store and the devices of a pool to a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from devices.device import Device, LeftOut
from planner.estimate import estimated_pool
from planner.make import make_plan
from planner.manual import parse_layers
from planner.measured import PoolTimes
from planner.plan import Plan
from planner.profile import ModelProfile
from planner.relaxed import Progress
from planner.workload import Workload
from potluck.config import DEFAULT_CONTEXT_TOKENS, Settings
from potluck.store import StoredModel
from transport.messages import PROTOCOL_VERSION, Register


def plan_for(
    model: StoredModel,
    pool: PoolTimes,
    settings: Settings,
    *,
    left_out: Sequence[LeftOut] = (),
    progress: Progress | None = None,
) -> Plan:
    """`left_out` are devices that could not be measured: the plan names them too. Raises DoesNotFit, ConfigError."""
    profile = profile_of(model)
    found = plan_with(profile, pool, settings, workload_of(profile, settings), progress=progress)
    return replace(found, left_out=(*left_out, *found.left_out))


def plan_with(
    profile: ModelProfile, pool: PoolTimes, settings: Settings, workload: Workload, *, progress: Progress | None = None
) -> Plan:
    return make_plan(
        profile,
        pool,
        workload,
        settings.objective,  # type: ignore[arg-type]  # Checked with the settings.
        layers=parse_layers(settings.layers) if settings.layers is not None else None,
        use_all=settings.use_all_devices,
        progress=progress,
    )


def workload_of(profile: ModelProfile, settings: Settings) -> Workload:
    """Chats with prompts and answers of the usual length, as many as KV memory is reserved for."""
    context_tokens = settings.context_tokens or min(DEFAULT_CONTEXT_TOKENS, profile.context_tokens)
    usual = Workload()
    return Workload(
        prompt_tokens=min(usual.prompt_tokens, max(1, context_tokens // 2)),
        output_tokens=min(usual.output_tokens, max(1, context_tokens // 2)),
        concurrency=settings.concurrency,
        context_tokens=context_tokens,
    )


def estimated_times(model: StoredModel, devices: Sequence[Device], head: str) -> PoolTimes:
    """A pool whose layers and links were not measured: from bandwidths."""
    return estimated_pool(profile_of(model), devices, head)


def profile_of(model: StoredModel) -> ModelProfile:
    spec = model.spec
    return ModelProfile(
        name=model.name,
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        context_tokens=spec.context_tokens,
        tied_embeddings=spec.tied_embeddings,
        layer_params=spec.layer_params,
        embed_params=spec.embed_params,
        norm_params=spec.norm_params,
        head_params=spec.head_params,
        kv_elements_per_token=spec.kv_elements_per_token,
        windows=spec.windows,
        legal_cuts=spec.legal_cuts,
    )


def register_of(device: Device, *, address: str | None = None) -> Register:
    """How a worker introduces its device; it fills in its own `pid`. `address` is its host's for other hosts."""
    return Register(
        version=PROTOCOL_VERSION,
        device=device.name,
        backend=device.backend,
        kind=device.kind,
        host=device.host,
        pid=0,
        threads=device.threads,
        free_bytes=device.free_bytes,
        total_bytes=device.total_bytes,
        memory_pool=device.memory_pool,
        bandwidth_bytes_per_s=device.bandwidth_bytes_per_s,
        compute_dtype=device.compute_dtype,
        address=address,
    )


def device_of(register: Register) -> Device:
    return Device(
        name=register.device,
        backend=register.backend,
        kind=register.kind,
        host=register.host,
        threads=register.threads,
        free_bytes=register.free_bytes,
        total_bytes=register.total_bytes,
        memory_pool=register.memory_pool,
        bandwidth_bytes_per_s=register.bandwidth_bytes_per_s,
        compute_dtype=register.compute_dtype,
    )
