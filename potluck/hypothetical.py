"""A device that someone does not own yet: "name,mem=24GiB,bw=1000GB/s,tflops=80,link=1GB/s,latency=0.5ms"."""

from __future__ import annotations

from dataclasses import dataclass

from devices.device import Device
from planner.advice import with_device
from planner.estimate import times_from_bandwidth
from planner.measured import PoolTimes
from planner.profile import ModelProfile
from potluck.config import parse_bytes
from transport.errors import ConfigError

_HINT = 'write it as --with "name,mem=24GiB,bw=1000GB/s" and, if known, tflops=80, link=1GB/s, latency=0.5ms, kind=cuda'
_KEYS = ("mem", "bw", "tflops", "link", "latency", "kind")
_KINDS = ("cuda", "mps", "mlx", "cpu")
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothetical:
    """`link_bytes_per_s`, `hop_s` None: like the pool's other links. `flops` None: what is usual at its bandwidth."""

    name: str
    kind: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops: float | None = None
    link_bytes_per_s: float | None = None
    hop_s: float | None = None


def parse_hypothetical(text: str) -> Hypothetical:
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
    return Hypothetical(
        name=name,
        kind="cuda:0" if kind == "cuda" else kind,
        memory_bytes=parse_bytes(facts["mem"]),
        bandwidth_bytes_per_s=_rate(facts["bw"]),
        flops=_number(facts["tflops"]) * 1e12 if "tflops" in facts else None,
        link_bytes_per_s=_rate(facts["link"]) if "link" in facts else None,
        hop_s=_seconds(facts["latency"]) if "latency" in facts else None,
    )


def pool_with(pool: PoolTimes, profile: ModelProfile, extra: Hypothetical) -> PoolTimes:
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


def _rate(text: str) -> float:
    if not text.endswith("/s"):
        raise ConfigError(f"{text!r} is not a rate", hint='write it as "100GB/s"')
    return _positive(float(parse_bytes(text[:-2])), text)


def _seconds(text: str) -> float:
    number = text.rstrip("smuµ")
    unit = text[len(number) :]
    if unit not in _SECONDS:
        raise ConfigError(f"{text!r} is not a time", hint='write it as "0.5ms"')
    return _number(number) * _SECONDS[unit]


def _number(text: str) -> float:
    try:
        return _positive(float(text), text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a number", hint=_HINT) from error


def _positive(value: float, text: str) -> float:
    if not 0 < value < float("inf"):
        raise ConfigError(f"{text!r} must be more than 0", hint=_HINT)
    return value
