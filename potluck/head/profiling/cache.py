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
from typing import Any

import msgspec

from devices.hardware.measure import is_noisy, should_remeasure
from potluck.head.profiling.calibration import LearnedFactor
from potluck.store.manifest import StoredModel
from shard.worker.profile.report import ProfileReport, decode_report
from transport.errors import BadMessage
from transport.links.link_probe import LinkMeasurement
from transport.messages.ring import WeightsForm
from transport.process.files import write_atomic

_VERSION = 3
_LINK_HOLDS_S = 86400.0


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


class NoisyMeasurement(msgspec.Struct, frozen=True, kw_only=True):
    """A report was disturbed, at `kept_s`, for the `num_tries`th time."""

    kept_s: float
    num_tries: int


def model_identity(model: StoredModel) -> str:
    """The same for the same contents: checksums where they are known, else sizes and times."""
    files = [[file.name, file.num_bytes, file.sha256 or file.modified_ns] for file in model.files]
    return hashlib.sha256(json.dumps([sorted(files), model.spec.to_json()]).encode()).hexdigest()


class ProfileCache:
    """`folder` is made when something is first kept. Failing to write only costs another measurement."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def report(self, key: DeviceKey) -> ProfileReport | None:
        found = self._read(_device_facts(key))
        if found is None:
            return None
        try:
            return decode_report(json.dumps(found.get("report")).encode())
        except BadMessage:
            return None

    def save_report(self, key: DeviceKey, report: ProfileReport, now_s: float = 0.0) -> None:
        """What was learned about an older report is forgotten with it. `now_s` is seconds since the epoch."""
        found: dict[str, Any] = {"report": msgspec.to_builtins(report)}
        if is_noisy(report.others_share):
            before = self._read_noisy(key)
            num_tries = 1 if before is None else before.num_tries + 1
            found["doubt"] = msgspec.to_builtins(NoisyMeasurement(kept_s=now_s, num_tries=num_tries))
        self._write(_device_facts(key), found)

    def should_remeasure(self, key: DeviceKey, now_s: float) -> bool:
        """Whether the report was disturbed by other programs, and is to be taken again now."""
        noisy = self._read_noisy(key)
        return noisy is not None and should_remeasure(noisy.kept_s, noisy.num_tries, now_s)

    def mark_noisy(self, key: DeviceKey) -> None:
        """The report is slower than the device was in use, so something disturbed it: take it again next time."""
        found = self._read(_device_facts(key))
        if found is not None:
            before = self._read_noisy(key)
            noisy = NoisyMeasurement(kept_s=0.0, num_tries=0 if before is None else before.num_tries)
            self._write(_device_facts(key), {**found, "doubt": msgspec.to_builtins(noisy)})

    def _read_noisy(self, key: DeviceKey) -> NoisyMeasurement | None:
        found = self._read(_device_facts(key))
        try:
            return msgspec.convert((found or {}).get("doubt"), NoisyMeasurement)
        except msgspec.ValidationError:
            return None

    def learned(self, key: DeviceKey) -> LearnedFactor | None:
        """How much slower than its report the device turned out to be in use."""
        found = self._read(_device_facts(key))
        try:
            return msgspec.convert((found or {}).get("learned"), LearnedFactor)
        except msgspec.ValidationError:
            return None

    def save_learned(self, key: DeviceKey, learned: LearnedFactor) -> None:
        found = self._read(_device_facts(key))
        if found is not None:
            self._write(_device_facts(key), {**found, "learned": msgspec.to_builtins(learned)})

    def slowdowns(self, keys: tuple[DeviceKey, ...]) -> tuple[float, ...] | None:
        """How much slower each of these devices is while the others work."""
        found = self._read(_group_facts(keys))
        factors = (found or {}).get("busy")
        if not isinstance(factors, list) or len(factors) != len(keys) or not all(map(_is_positive_number, factors)):
            return None
        return tuple(float(factor) for factor in factors)

    def save_slowdowns(self, keys: tuple[DeviceKey, ...], factors: tuple[float, ...]) -> None:
        self._write(_group_facts(keys), {"busy": list(factors)})

    def link(self, source: str, target: str, how: str, now_s: float) -> LinkMeasurement | None:
        """Networks change: a link's figures hold for a day. `now_s` is seconds since the epoch."""
        found = self._read(_link_facts(source, target, how)) or {}
        kept_s = found.get("kept_s")
        if not isinstance(kept_s, float) or not 0 <= now_s - kept_s < _LINK_HOLDS_S:
            return None
        try:
            figures = msgspec.convert(found.get("link"), LinkMeasurement)
        except msgspec.ValidationError:
            return None
        sound = figures.hop_s >= 0 and figures.hop_p95_s >= 0 and _is_positive_number(figures.bytes_per_s)
        return figures if sound else None

    def save_link(self, source: str, target: str, how: str, figures: LinkMeasurement, now_s: float) -> None:
        self._write(_link_facts(source, target, how), {"link": msgspec.to_builtins(figures), "kept_s": now_s})

    def _read(self, facts: dict[str, Any]) -> dict[str, Any] | None:
        try:
            data = json.loads(self._path(facts).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        # The facts are in the file as well, and compared: a name is only their hash.
        if not isinstance(data, dict) or data.get("facts") != facts or not isinstance(data.get("found"), dict):
            return None
        found: dict[str, Any] = data["found"]
        return found

    def _write(self, facts: dict[str, Any], found: dict[str, Any]) -> None:
        path = self._path(facts)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps({"facts": facts, "found": found}).encode())

    def _path(self, facts: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self._folder / f"{facts['what']}-{digest[:24]}.json"


def _device_facts(key: DeviceKey) -> dict[str, Any]:
    return {"what": "device", "version": _VERSION, **msgspec.to_builtins(key)}


def _group_facts(keys: tuple[DeviceKey, ...]) -> dict[str, Any]:
    return {"what": "busy", "version": _VERSION, "devices": [msgspec.to_builtins(key) for key in keys]}


def _link_facts(source: str, target: str, how: str) -> dict[str, Any]:
    return {"what": "link", "version": _VERSION, "source": source, "target": target, "how": how}


def _is_positive_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
