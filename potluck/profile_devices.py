"""The times of a pool's devices with one model: remembered, or measured now, each alone and then beside the others."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from rich.markup import escape

from devices.device import Device, LeftOut
from devices.doubt import is_disturbed
from planner.measured import DeviceTimes, Grid, LayerTimes
from potluck.calibration import corrected, factor_at, is_off
from potluck.device_probes import DeviceProbes, Doing
from potluck.profile_cache import DeviceKey, ProfileCache, model_identity
from potluck.store import StoredModel
from shard.profile.report import GridReport, ProfileReport
from transport.errors import PotluckError
from transport.messages import WeightsForm

_STEADY_S = 1.0


def device_key(model: StoredModel, device: Device, machine: str, weights: WeightsForm) -> DeviceKey:
    """Under what a device's times are kept. `machine` is what its worker registered with."""
    return DeviceKey(
        host=device.host,
        backend=device.backend,
        kind=device.kind,
        threads=device.threads,
        dtype=device.compute_dtype,
        machine=machine,
        model=model_identity(model),
        weights=weights,
    )


def device_times(device: Device, report: ProfileReport, busy: float = 1.0) -> DeviceTimes:
    """The planner's words for a report."""
    return DeviceTimes(
        device=device,
        kinds=report.kinds,
        layers=tuple(LayerTimes(decode=_grid(one.decode), prefill=_grid(one.prefill)) for one in report.layers),
        embed=_grid(report.embed),
        head=_grid(report.head),
        step_s=report.step_s,
        busy=busy,
    )


def _grid(report: GridReport) -> Grid:
    return Grid(rows=report.rows, contexts=report.contexts, seconds=report.seconds)


@dataclass(slots=True)
class DeviceMeasuring:
    """One round of measuring devices, with what was remembered."""

    model: StoredModel
    weights: WeightsForm
    cache: ProfileCache
    probes: DeviceProbes
    say: Callable[[str], object]
    doing: Doing
    fresh: bool
    _keys: dict[str, DeviceKey] = field(default_factory=dict)
    _known: dict[str, ProfileReport] = field(default_factory=dict)
    _doubtful: dict[str, ProfileReport] = field(default_factory=dict)
    _disturbed: dict[str, float] = field(default_factory=dict)
    _busy: dict[str, float] = field(default_factory=dict)
    _errors: dict[str, str] = field(default_factory=dict)
    _done: set[str] = field(default_factory=set)

    def run(self, devices: Sequence[Device], *, in_turn: bool) -> tuple[list[DeviceTimes], list[LeftOut]]:
        """The times of all that could be measured, and why the others could not. See `pool_times_for`."""
        self._keys = {
            device.name: device_key(self.model, device, self.probes.machine(device), self.weights) for device in devices
        }
        if not self.fresh:
            reports = {device.name: self.cache.report(self._keys[device.name]) for device in devices}
            known = {name: report for name, report in reports.items() if report is not None}
            now_s = time.time()
            self._doubtful = {name: one for name, one in known.items() if self.cache.is_due(self._keys[name], now_s)}
            self._known = {name: report for name, report in known.items() if name not in self._doubtful}
        groups = _groups(devices)
        for batch in _batches([group for group in groups if not self._is_known(group)], in_turn=in_turn):
            self._measure(batch)
        if self._disturbed:
            most, names = max(self._disturbed.values()), ", ".join(sorted(self._disturbed))
            what = f"Other programs had up to {100 * most:.0f} % of the processors meanwhile"
            self.say(escape(f"{what}; measured again at a later start, or with potluck up --fresh: {names}"))
        now_s = time.time()
        return (
            [self._times(device, now_s) for device in devices if device.name in self._known],
            [LeftOut(name=name, reason=reason) for name, reason in self._errors.items()],
        )

    def _times(self, device: Device, now_s: float) -> DeviceTimes:
        times = device_times(device, self._known[device.name], self._busy.get(device.name, 1.0))
        learned = None if self.fresh else self.cache.learned(self._keys[device.name])
        factor = factor_at(learned, now_s)
        if is_off(factor):
            words = f"{device.name} took {factor:.2f}× what was measured of it when it was in use, and is planned so"
            self.say(escape(f"{words}; --fresh measures it anew"))
        return corrected(times, factor)

    def _is_known(self, group: Sequence[Device]) -> bool:
        """Whether all of the group, and what its devices do to each other, is remembered."""
        if not all(device.name in self._known for device in group):
            return False
        factors = (1.0,) if len(group) == 1 else None if self.fresh else self.cache.busy(self._keys_of(group))
        if factors is not None:
            self._busy.update({device.name: factor for device, factor in zip(group, factors, strict=True)})
        return factors is not None

    def _measure(self, groups: Sequence[Sequence[Device]]) -> None:
        """Groups of different hosts, at the same time; a group's devices one after another, and then all together."""
        everyone = [device for group in groups for device in group]
        self.say(escape(f"Measuring {self.model.name} on {', '.join(device.name for device in everyone)}"))
        try:
            self._profile([[device for device in group if device.name not in self._known] for group in groups])
            groups = [[device for device in group if device.name in self._known] for group in groups]
            groups = [group for group in groups if group and not self._is_known(group)]
            # What was remembered of some must be loaded to be measured beside the others.
            self._profile([[device for device in group if device.name not in self._done] for group in groups])
            for group in groups:
                self._measure_busy([device for device in group if device.name in self._known])
        finally:
            self.probes.end(everyone)

    def _profile(self, groups: Sequence[Sequence[Device]]) -> None:
        for column in zip_longest(*groups):
            batch = [device for device in column if device is not None]
            results = self.probes.profile(batch, self.model.path, self.weights, self.doing)
            for device, result in zip(batch, results, strict=True):
                if isinstance(result, PotluckError):
                    self._errors[device.name] = result.message
                    self.say(f"[yellow]{escape(device.name)} is left out:[/yellow] {escape(result.message)}")
                    self._known.pop(device.name, None)
                else:
                    self._keep(device, result)

    def _keep(self, device: Device, report: ProfileReport) -> None:
        """Devices that are alike get equal times, those of the one that was disturbed least: the planner need not
        tell them apart then. Of what was disturbed twice, the better counts."""
        self._done.add(device.name)
        earlier = self._doubtful.get(device.name)
        if is_disturbed(report.others_share):
            self._disturbed[device.name] = report.others_share
            if earlier is not None:
                report = min(earlier, report, key=lambda one: one.steady_s)
        self._known[device.name] = report
        alike = [name for name in self._done if self._keys[name] == self._keys[device.name]]
        best = min((self._known[name] for name in alike), key=lambda one: one.steady_s)
        self._known.update(dict.fromkeys(alike, best))
        self.cache.keep_report(self._keys[device.name], best, time.time())

    def _measure_busy(self, group: Sequence[Device]) -> None:
        if len(group) < 2:
            return
        for device in group:
            self.doing(device.name, "while the others work")
        # Alone once more, at about the same time: other programs come and go.
        alone = [self.probes.steady([device], _STEADY_S / 2)[0] for device in group]
        together = self.probes.steady(group, _STEADY_S)
        factors: dict[DeviceKey, list[float]] = defaultdict(list)
        for device, alone_s, together_s in zip(group, alone, together, strict=True):
            factors[self._keys[device.name]].append(_slowdown(alone_s, together_s))
        means = {device.name: statistics.fmean(factors[self._keys[device.name]]) for device in group}
        self._busy.update(means)
        self.cache.keep_busy(self._keys_of(group), tuple(means.values()))

    def _keys_of(self, group: Sequence[Device]) -> tuple[DeviceKey, ...]:
        return tuple(self._keys[device.name] for device in group)


def _slowdown(alone_s: float | PotluckError, together_s: float | PotluckError) -> float:
    """1 where one of the two failed: the device did not fail before, and its own times hold."""
    if isinstance(alone_s, PotluckError) or isinstance(together_s, PotluckError):
        return 1.0
    return max(1.0, together_s / alone_s)


def _groups(devices: Sequence[Device]) -> list[list[Device]]:
    """Devices that share memory, and with it its bus or their cores."""
    by_pool: dict[str, list[Device]] = defaultdict(list)
    for device in devices:
        by_pool[device.memory_pool].append(device)
    # Each may take what it would get if all held their layers at once.
    return [
        [replace(one, free_bytes=min(one.free_bytes, one.total_bytes // len(group))) for one in group]
        for group in by_pool.values()
    ]


def _batches(groups: Sequence[list[Device]], *, in_turn: bool) -> Iterator[list[list[Device]]]:
    """Groups to measure at the same time: one of each host, or one at all."""
    if in_turn:
        yield from ([group] for group in groups)
        return
    by_host: dict[str, list[list[Device]]] = defaultdict(list)
    for group in groups:
        by_host[group[0].host].append(group)
    for column in zip_longest(*by_host.values()):
        yield [group for group in column if group is not None]
