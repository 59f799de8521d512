"""Plan inputs that nobody measures here: a saved pool file, and a device described on the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from devices.hardware.device import Device
from planner.explain import with_device
from planner.measurements import PoolTimes, times_from_bandwidth
from planner.memory import ModelProfile
from planner.pool_file import SavedPool, pool_from_json, pool_to_json
from potluck.system.byte_sizes import parse_bytes
from transport.errors import ConfigError


def load_pool(path: Path) -> SavedPool:
    """Raises ConfigError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"the pool file {path} can't be read: {error}", hint="save one with --save-pool") from error
    return pool_from_json(data, where=str(path))


def save_pool(path: Path, profile: ModelProfile, times: PoolTimes) -> None:
    """Raises ConfigError."""
    try:
        path.write_text(json.dumps(pool_to_json(profile, times), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the pool file {path} can't be written: {error}", hint="choose another --save-pool"
        ) from error


_HINT = 'write it as --with "name,mem=24GiB,bw=1000GB/s" and, if known, tflops=80, link=1GB/s, latency=0.5ms, kind=cuda'
_KEYS = ("mem", "bw", "tflops", "link", "latency", "kind")
_KINDS = ("cuda", "mps", "mlx", "cpu")
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


@dataclass(frozen=True, slots=True, kw_only=True)
class HypotheticalDevice:
    """`link_bytes_per_s`, `hop_s` None: like the pool's other links. `flops` None: what is usual at its bandwidth."""

    name: str
    kind: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops: float | None = None
    link_bytes_per_s: float | None = None
    hop_s: float | None = None


def parse_hypothetical(text: str) -> HypotheticalDevice:
    """Raises ConfigError."""
    name, *parts = (part.strip() for part in text.split(","))
    facts: dict[str, str] = {}
    for part in parts:
        key, sign, value = part.partition("=")
        if not sign or key not in _KEYS or key in facts:
            raise ConfigError(f"{part!r} says nothing of a device, or says it twice", hint=_HINT)
        facts[key] = value
    if not name or "=" in name or "mem" not in facts or "bw" not in facts:
        raise ConfigError(f"{text!r} lacks a name, mem or bw", hint=_HINT)
    kind = facts.get("kind", "cuda")
    if kind not in _KINDS:
        raise ConfigError(f"kind={kind} is unknown", hint=f"it is one of: {', '.join(_KINDS)}")
    return HypotheticalDevice(
        name=name,
        kind="cuda:0" if kind == "cuda" else kind,
        memory_bytes=parse_bytes(facts["mem"]),
        bandwidth_bytes_per_s=_parse_rate(facts["bw"]),
        flops=_parse_number(facts["tflops"]) * 1e12 if "tflops" in facts else None,
        link_bytes_per_s=_parse_rate(facts["link"]) if "link" in facts else None,
        hop_s=_parse_seconds(facts["latency"]) if "latency" in facts else None,
    )


def add_hypothetical(pool: PoolTimes, profile: ModelProfile, extra: HypotheticalDevice) -> PoolTimes:
    """The pool with that device on a host of its own, its times estimated. Raises ConfigError for a name in use."""
    taken = {times.device.name for times in pool.devices} | {times.device.host for times in pool.devices}
    if extra.name in taken | {pool.head}:
        raise ConfigError(f"--with {extra.name}: the pool has one of that name", hint="give it another name")
    device = Device(
        name=extra.name,
        backend="mlx" if extra.kind == "mlx" else "torch",
        kind=extra.kind,
        host=extra.name,
        threads=1,
        free_bytes=extra.memory_bytes,
        total_bytes=extra.memory_bytes,
        bandwidth_bytes_per_s=extra.bandwidth_bytes_per_s,
        compute_dtype="bfloat16",
        memory_pool=extra.name,
    )
    times = times_from_bandwidth(profile, device, flops=extra.flops)
    return with_device(pool, times, extra.hop_s, extra.link_bytes_per_s)


def _parse_rate(text: str) -> float:
    if not text.endswith("/s"):
        raise ConfigError(f"{text!r} is not a rate", hint='write it as "100GB/s"')
    return _check_positive(float(parse_bytes(text[:-2])), text)


def _parse_seconds(text: str) -> float:
    number = text.rstrip("smuµ")
    unit = text[len(number) :]
    if unit not in _SECONDS:
        raise ConfigError(f"{text!r} is not a time", hint='write it as "0.5ms"')
    return _parse_number(number) * _SECONDS[unit]


def _parse_number(text: str) -> float:
    try:
        return _check_positive(float(text), text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a number", hint=_HINT) from error


def _check_positive(value: float, text: str) -> float:
    if not 0 < value < float("inf"):
        raise ConfigError(f"{text!r} must be more than 0", hint=_HINT)
    return value
