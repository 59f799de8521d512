"""Planning turns a model of the store, measured devices and the settings into a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

from devices.hardware.device import Device, UnavailableDevice
from planner.measurements import PoolTimes, estimated_pool
from planner.memory import QUANTIZE_OPTION, ModelProfile, WeightSizes
from planner.options import Workload, parse_layers
from planner.plan import Plan
from planner.relaxation import SearchProgress
from planner.solve import any_ring_fits, make_plan
from potluck.store.manifest import StoredModel
from potluck.store.model_details import config_of
from potluck.system.settings import DEFAULT_CONTEXT_TOKENS, Settings
from shard.formats.checkpoint import supported_form
from shard.formats.spec import Backend
from transport.errors import DoesNotFit
from transport.messages.control import Register
from transport.messages.ring import DType, KVForm, WeightsForm

_FORM_OF: dict[str, WeightsForm] = {option: form for form, option in QUANTIZE_OPTION.items()}
_AUTO_FORMS: tuple[WeightsForm, ...] = ("stored", "8-bit", "4-bit")


def plan_for(
    model: StoredModel,
    pool: PoolTimes,
    settings: Settings,
    *,
    weights: WeightsForm = "stored",
    left_out: Sequence[UnavailableDevice] = (),
    progress: SearchProgress | None = None,
) -> Plan:
    """`pool` was measured with `weights`. `left_out` are devices that could not be measured: the plan names them too.

    Raises DoesNotFit, ConfigError.
    """
    profile = profile_of(model, weights, kv_of(settings))
    found = plan_with(profile, pool, settings, workload_of(profile, settings), progress=progress)
    return replace(found, left_out=(*left_out, *found.left_out))


def plan_with(
    profile: ModelProfile,
    pool: PoolTimes,
    settings: Settings,
    workload: Workload,
    *,
    progress: SearchProgress | None = None,
) -> Plan:
    return make_plan(
        profile,
        pool,
        workload,
        settings.objective,  # type: ignore[arg-type]  # Checked with the settings.
        layers=parse_layers(settings.layers) if settings.layers is not None else None,
        use_all=settings.use_all,
        progress=progress,
    )


def workload_of(profile: ModelProfile, settings: Settings) -> Workload:
    """Chats with prompts and answers of the usual length, as many as KV memory is reserved for."""
    context_tokens = settings.context or min(DEFAULT_CONTEXT_TOKENS, profile.context_tokens)
    usual = Workload()
    return Workload(
        prompt_tokens=min(usual.prompt_tokens, max(1, context_tokens // 2)),
        output_tokens=min(usual.output_tokens, max(1, context_tokens // 2)),
        concurrency=settings.concurrency,
        context_tokens=context_tokens,
    )


def estimate_times(
    model: StoredModel, devices: Sequence[Device], head: str, weights: WeightsForm = "stored"
) -> PoolTimes:
    """A pool whose layers and links were not measured: from bandwidths."""
    return estimated_pool(profile_of(model, weights), devices, head)


def choose_weights(
    profile: ModelProfile, devices: Sequence[Device], head: str, settings: Settings, say: Callable[[str], object]
) -> WeightsForm:
    """The form that --quantize means. For `auto` the first of stored, 8 and 4 bits that fits these devices, as if their
    hosts all reached each other; stored if none does. Says which."""
    if settings.quantize != "auto":
        return _FORM_OF[settings.quantize]
    workload = workload_of(profile, settings)
    profile = replace(profile, kv=kv_of(settings))
    for form in _AUTO_FORMS:
        if _fits(replace(profile, weights=form), devices, head, settings, workload):
            why = "" if form == "stored" else f": {'as stored' if form == '8-bit' else 'in 8 bits'} it does not fit"
            say(f"Weights of {profile.name}: {form}{why}")
            return form
    return "stored"


def kv_of(settings: Settings) -> KVForm:
    """The form that --kv-cache names."""
    return settings.kv_cache  # type: ignore[return-value]  # Checked with the settings.


def _fits(profile: ModelProfile, devices: Sequence[Device], head: str, settings: Settings, workload: Workload) -> bool:
    pool = estimated_pool(profile, devices, head)
    if settings.layers is None:
        return any_ring_fits(profile, pool, workload)
    try:
        plan_with(profile, pool, settings, workload)
    except DoesNotFit:
        return False
    return True


def profile_of(model: StoredModel, weights: WeightsForm = "stored", kv: KVForm = "full") -> ModelProfile:
    spec, config = model.spec, config_of(model)
    return ModelProfile(
        name=model.name,
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        context_tokens=spec.context_tokens,
        tied_embeddings=spec.tied_embeddings,
        layer_params=spec.layer_params,
        head_params=spec.head_params,
        sizes=tuple(
            _weight_sizes(model, config, form, backend, dtype)
            for form in get_args(WeightsForm)
            for backend in get_args(Backend)
            for dtype in get_args(DType)
        ),
        kv_elements_per_token=spec.kv_elements_per_token,
        windows=spec.windows,
        legal_cuts=spec.legal_cuts,
        weights=weights,
        head_dim=spec.head_dim,
        kv=kv,
    )


def _weight_sizes(
    model: StoredModel, config: dict[str, Any], weights: WeightsForm, backend: Backend, dtype: DType
) -> WeightSizes:
    taken = model.spec.part_bytes(
        backend, dtype, supported_form(backend, config, weights, stacked_experts=model.spec.stacked_experts)
    )
    return WeightSizes(
        weights=weights,
        backend=backend,
        dtype=dtype,
        layers=taken.layers,
        embed=taken.embed,
        norm=taken.norm,
        head=taken.lm_head,
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
