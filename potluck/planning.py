"""From a model of the store and the devices of a pool to a plan."""

from __future__ import annotations

from collections.abc import Sequence

from devices.device import Device
from planner.partition import plan_proportional
from planner.plan import Plan
from planner.profile import ModelProfile
from potluck.config import DEFAULT_CONTEXT_TOKENS, Settings
from potluck.store import StoredModel
from transport.messages import PROTOCOL_VERSION, Register


def plan_for(model: StoredModel, devices: Sequence[Device], settings: Settings) -> Plan:
    """Raises DoesNotFit, ConfigError."""
    context_tokens = settings.context_tokens or min(DEFAULT_CONTEXT_TOKENS, model.spec.context_tokens)
    return plan_proportional(
        profile_of(model), devices, context_tokens, settings.concurrency, use_all=settings.use_all_devices
    )


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
