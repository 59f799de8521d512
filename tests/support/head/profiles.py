"""Made-up reports, models and probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from devices.hardware.device import Device
from potluck.head.profiling.probes import OnMeasuring
from potluck.store.manifest import StoredFile, StoredModel
from shard.formats.spec import ModelSpec
from transport.errors import PotluckError
from transport.messages.measure import Grid, LayerTimes, ProfileReport
from transport.messages.ring import WeightsForm


def grid(seconds: float) -> Grid:
    return Grid(rows=(1, 2), contexts=(0,), seconds=((seconds,), (2 * seconds,)))


def report(seconds: float = 0.001, num_layers: int = 4) -> ProfileReport:
    return ProfileReport(
        kinds=(0,) * num_layers,
        layers=(LayerTimes(decode=grid(seconds), prefill=grid(10 * seconds)),),
        embed=grid(0.0),
        lm_head=grid(3 * seconds),
        step_s=seconds / 10,
        under_load_s=2 * seconds,
    )


def model(path: Path, sha256: str = "0" * 64) -> StoredModel:
    spec = ModelSpec(
        architecture="llama",
        num_layers=4,
        hidden_size=64,
        vocab_size=128,
        context_tokens=256,
        tied_embeddings=False,
        layer_params=(1000,) * 4,
        embed_params=1000,
        norm_params=64,
        head_params=1000,
        kv_elements_per_token=(64,) * 4,
        windows=(None,) * 4,
        legal_cuts=(1, 2, 3),
        stored_dtype="F32",
        file_bytes=1000,
    )
    file = StoredFile(name="model.safetensors", num_bytes=1000, modified_ns=0, sha256=sha256)
    return StoredModel(name="tiny", source="made up", path=path, files=(file,), spec=spec)


@dataclass
class MadeUpProbes:
    """Answers `reports` by a device's name, in turn where there are several; remembers what was asked for."""

    reports: dict[str, list[ProfileReport | PotluckError]]
    together: float = 1.5
    asked: list[list[str]] = field(default_factory=list)
    asked_weights: list[WeightsForm] = field(default_factory=list)
    measured_together: list[list[str]] = field(default_factory=list)
    loaded: set[str] = field(default_factory=set)

    def machine(self, device: Device) -> str:
        return "a machine"

    def profile(
        self, devices: Sequence[Device], path: Path, weights: WeightsForm, doing: OnMeasuring
    ) -> list[ProfileReport | PotluckError]:
        self.asked.append([device.name for device in devices])
        self.asked_weights.append(weights)
        found = [self.reports[device.name].pop(0) for device in devices]
        self.loaded |= {
            device.name for device, one in zip(devices, found, strict=True) if isinstance(one, ProfileReport)
        }
        return found

    def measure_under_load(self, devices: Sequence[Device], seconds: float) -> list[float | PotluckError]:
        assert {device.name for device in devices} <= self.loaded
        if len(devices) > 1:
            self.measured_together.append([device.name for device in devices])
        return [self.together if len(devices) > 1 else 1.0 for _ in devices]

    def end(self, devices: Sequence[Device]) -> None:
        self.loaded -= {device.name for device in devices}
