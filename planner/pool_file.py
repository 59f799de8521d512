"""A pool as plain data, for a file: what was measured, and the model that it was measured with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from planner.measurements import DeviceTimes, PoolTimes
from planner.memory import ModelProfile
from transport.errors import ConfigError
from transport.messages.measure import is_time

POOL_FILE_FORMAT = "potluck-pool"
POOL_FILE_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedPool:
    """`times` are of the model in `profile`; for another one only the devices' own facts hold."""

    format: str
    version: int
    profile: ModelProfile
    times: PoolTimes


def pool_to_json(profile: ModelProfile, times: PoolTimes) -> dict[str, Any]:
    saved = SavedPool(format=POOL_FILE_FORMAT, version=POOL_FILE_VERSION, profile=profile, times=times)
    plain: dict[str, Any] = msgspec.to_builtins(saved)
    return plain


def pool_from_json(data: object, *, where: str) -> SavedPool:
    """Raises ConfigError for anything that `pool_to_json` would not write."""
    if not isinstance(data, dict) or data.get("format") != POOL_FILE_FORMAT:
        raise ConfigError(f"{where} is not a pool file", hint="make one with: potluck plan MODEL --save-pool FILE")
    if data.get("version") != POOL_FILE_VERSION:
        raise ConfigError(
            f"{where} has version {data.get('version')!r}; this Potluck reads {POOL_FILE_VERSION}", hint="save it again"
        )
    try:
        saved = msgspec.convert(data, SavedPool)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}", hint="save it again with --save-pool") from error
    problem = _unknown_key(data, msgspec.to_builtins(saved), "") or _problem(saved)
    if problem:
        raise ConfigError(f"{where}: {problem}", hint="save it again with --save-pool")
    return saved


def _unknown_key(data: object, known: object, path: str) -> str | None:
    if isinstance(data, dict) and isinstance(known, dict):
        for key, value in data.items():
            if key not in known:
                return f"unknown key {path}{key}"
            found = _unknown_key(value, known[key], f"{path}{key}.")
            if found:
                return found
    if isinstance(data, list) and isinstance(known, list | tuple):
        pairs = zip(data, known, strict=True)
        return next(filter(None, (_unknown_key(*pair, f"{path}{i}.") for i, pair in enumerate(pairs))), None)
    return None


def _problem(saved: SavedPool) -> str | None:
    profile, times = saved.profile, saved.times
    if profile.num_layers < 1 or profile.context_tokens < 1 or profile.hidden_size < 1:
        return "the model has no layers, context or width"
    if profile.head_dim is not None and profile.head_dim < 1:
        return "the model's heads have no width"
    of_layers = [sizes.layers for sizes in profile.sizes]
    per_layer = (profile.layer_params, profile.kv_elements_per_token, profile.windows, *of_layers)
    if any(len(values) != profile.num_layers for values in per_layer):
        return f"the model's facts are not of {profile.num_layers} layers"
    if list(profile.legal_cuts) != sorted({cut for cut in profile.legal_cuts if 0 < cut < profile.num_layers}):
        return "the model's legal cuts are not layers in order"
    if min(*profile.layer_params, *profile.kv_elements_per_token, profile.head_params) < 0 or not all(
        min(*sizes.layers, sizes.embed, sizes.norm, sizes.head) >= 0 for sizes in profile.sizes
    ):
        return "the model has a negative size"
    for link in times.links:
        if not (is_time(link.hop_s) and is_time(link.hop_p95_s) and link.bytes_per_s > 0):
            return f"the link {link.source} → {link.target} needs finite times ≥ 0 and a rate > 0"
    return next(filter(None, (_device_problem(device, profile) for device in times.devices)), None)


def _device_problem(times: DeviceTimes, profile: ModelProfile) -> str | None:
    device = times.device
    if (profile.weights, device.backend, device.compute_dtype) not in {
        (sizes.weights, sizes.backend, sizes.dtype) for sizes in profile.sizes
    }:
        return f"what the model takes on {device.name} is not in it"
    if len(times.kinds) != profile.num_layers or not all(0 <= kind < len(times.layers) for kind in times.kinds):
        return f"{device.name}'s kinds of layers are not those of the model"
    if not device.free_bytes >= 0 or not device.total_bytes >= 0 or not device.bandwidth_bytes_per_s > 0:
        return f"{device.name}: memory must be ≥ 0 bytes and bandwidth_bytes_per_s > 0"
    grids = [times.embed, times.head, *(grid for layer in times.layers for grid in (layer.decode, layer.prefill))]
    if not is_time(times.step_s) or times.busy < 1 or not all(grid.is_plausible() for grid in grids):
        return f"{device.name}: times must be finite and ≥ 0, busy ≥ 1, and grids whole with ascending axes"
    return None
