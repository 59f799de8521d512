"""Measured times, remembered: one small file for each device and model, and for each pair of hosts.

A file that is missing, corrupt, old or of another version means measuring again. Each file names all that its times
depend on, and is replaced at once: a reader sees the old or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from devices.hardware.measure import NoisyMeasurement, is_noisy
from potluck.head.plan_watch import LearnedFactor
from potluck.store.manifest import StoredModel
from transport.links.link_probe import LinkMeasurement
from transport.messages.measure import ProfileReport
from transport.messages.ring import WeightsForm
from transport.process.files import write_atomic

_VERSION = 4
_LINK_HOLDS_S = 86400.0
_Positive = Annotated[float, Meta(gt=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKey:
    """All that a device's times depend on. `machine` is what its worker says of it, `host` the host's name."""

    host: str
    backend: str
    kind: str
    threads: int
    dtype: str
    machine: str
    model: str
    weights: WeightsForm = "stored"


class _CachedDevice(Struct, frozen=True, kw_only=True):
    """`learned`: how much slower than its report the device turned out to be in use."""

    report: ProfileReport
    noisy: NoisyMeasurement | None = None
    learned: LearnedFactor | None = None


class _CachedLink(Struct, frozen=True, kw_only=True):
    link: LinkMeasurement
    kept_s: float


Cached = TypeVar("Cached")


def model_identity(model: StoredModel) -> str:
    """The same for the same contents: checksums where they are known, else sizes and times."""
    files = [[file.name, file.num_bytes, file.sha256 or file.modified_ns] for file in model.files]
    return hashlib.sha256(json.dumps([sorted(files), model.spec.to_json()]).encode()).hexdigest()


class ProfileCache:
    """`folder` is made when something is first saved. Failing to write only costs another measurement."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def report(self, key: DeviceKey) -> ProfileReport | None:
        found = self._device(key)
        return None if found is None else found.report

    def save_report(self, key: DeviceKey, report: ProfileReport, now_s: float = 0.0) -> None:
        """What was learned about an older report is forgotten with it. `now_s` is seconds since the epoch."""
        noisy = None
        if is_noisy(report.others_share):
            noisy = NoisyMeasurement(kept_s=now_s, num_tries=_num_tries(self._device(key)) + 1)
        self._write(_device_facts(key), _CachedDevice(report=report, noisy=noisy))

    def should_remeasure(self, key: DeviceKey, now_s: float) -> bool:
        """Whether the report is noisy, and is to be taken again now."""
        found = self._device(key)
        noisy = found.noisy if found is not None else None
        return noisy is not None and noisy.is_due(now_s)

    def mark_noisy(self, key: DeviceKey) -> None:
        """The report is slower than the device was in use, so something disturbed it: measure again next time."""
        found = self._device(key)
        if found is not None:
            noisy = NoisyMeasurement(kept_s=0.0, num_tries=_num_tries(found))
            self._write(_device_facts(key), replace(found, noisy=noisy))

    def learned(self, key: DeviceKey) -> LearnedFactor | None:
        found = self._device(key)
        return None if found is None else found.learned

    def save_learned(self, key: DeviceKey, learned: LearnedFactor) -> None:
        found = self._device(key)
        if found is not None:
            self._write(_device_facts(key), replace(found, learned=learned))

    def slowdowns(self, keys: tuple[DeviceKey, ...]) -> tuple[float, ...] | None:
        """How much slower each of these devices is while the others work."""
        factors = self._read(_group_facts(keys), tuple[_Positive, ...])
        return factors if factors is not None and len(factors) == len(keys) else None

    def save_slowdowns(self, keys: tuple[DeviceKey, ...], factors: tuple[float, ...]) -> None:
        self._write(_group_facts(keys), factors)

    def link(self, source: str, target: str, how: str, now_s: float) -> LinkMeasurement | None:
        """Networks change: a link's figures hold for a day. `now_s` is seconds since the epoch."""
        found = self._read(_link_facts(source, target, how), _CachedLink)
        if found is None or not 0 <= now_s - found.kept_s < _LINK_HOLDS_S:
            return None
        figures = found.link
        return figures if min(figures.hop_s, figures.hop_p95_s) >= 0 and figures.bytes_per_s > 0 else None

    def save_link(self, source: str, target: str, how: str, figures: LinkMeasurement, now_s: float) -> None:
        self._write(_link_facts(source, target, how), _CachedLink(link=figures, kept_s=now_s))

    def _device(self, key: DeviceKey) -> _CachedDevice | None:
        found = self._read(_device_facts(key), _CachedDevice)
        return found if found is not None and found.report.is_plausible() else None

    def _read(self, facts: dict[str, Any], type: type[Cached]) -> Cached | None:
        try:
            data = msgspec.json.decode(self._path(facts).read_bytes(), type=dict[str, msgspec.Raw])
            # The facts are in the file as well, and compared: a name is only their hash.
            return (
                msgspec.json.decode(data["found"], type=type) if msgspec.json.decode(data["facts"]) == facts else None
            )
        except (OSError, KeyError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    def _write(self, facts: dict[str, Any], found: Any) -> None:
        path = self._path(facts)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, msgspec.json.encode({"facts": facts, "found": found}))

    def _path(self, facts: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self._folder / f"{facts['what']}-{digest[:24]}.json"


def _num_tries(found: _CachedDevice | None) -> int:
    return found.noisy.num_tries if found is not None and found.noisy is not None else 0


def _device_facts(key: DeviceKey) -> dict[str, Any]:
    return {"what": "device", "version": _VERSION, **msgspec.to_builtins(key)}


def _group_facts(keys: tuple[DeviceKey, ...]) -> dict[str, Any]:
    return {"what": "busy", "version": _VERSION, "devices": [msgspec.to_builtins(key) for key in keys]}


def _link_facts(source: str, target: str, how: str) -> dict[str, Any]:
    return {"what": "link", "version": _VERSION, "source": source, "target": target, "how": how}
