"""Two ways to have a device profiled: by its worker in a pool, or by a child of this process where there is no pool."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from devices.device import Device
from planner.demand import runtime_reserve_bytes
from potluck.pool import Pool, PoolWorker
from shard.machine import machine_facts
from shard.profile.process import SILENCE_S, ProfileProcess
from shard.profile.report import ProfileReport, decode_report
from shard.profile.settings import BUDGET_S, ProfileSettings
from transport.errors import PotluckError, StageFailed
from transport.measure_messages import EndProfile, MeasureAnswer, MeasureQuestion, Profile, Profiled, Steady, SteadyTime
from transport.messages import WeightsForm
from transport.pool_messages import SharedModel

Doing = Callable[[str, str], None]
"""Called with a device's name and what is being measured of it."""


class DeviceProbes(Protocol):
    """Profiles devices; an error in place of what could not be measured. `end` frees what `profile` has loaded."""

    def machine(self, device: Device) -> str: ...

    def profile(
        self, devices: Sequence[Device], model: Path, weights: WeightsForm, doing: Doing
    ) -> list[ProfileReport | PotluckError]:
        """All at once: they must not be in each other's way."""

    def steady(self, devices: Sequence[Device], seconds: float) -> list[float | PotluckError]:
        """All at once, to be in each other's way. After `profile`."""

    def end(self, devices: Sequence[Device]) -> None: ...


@dataclass(slots=True)
class WorkerProbes:
    """By the devices' workers, wherever they are."""

    pool: Pool
    shared: Callable[[PoolWorker], SharedModel | None] = lambda worker: None
    budget_s: float = BUDGET_S
    silence_s: float = SILENCE_S

    def machine(self, device: Device) -> str:
        return self._worker(device).register.machine

    def profile(
        self, devices: Sequence[Device], model: Path, weights: WeightsForm, doing: Doing
    ) -> list[ProfileReport | PotluckError]:
        questions: list[tuple[PoolWorker, MeasureQuestion]] = [
            (
                (worker := self._worker(device)),
                Profile(
                    model_path=str(model),
                    dtype=device.compute_dtype,
                    budget_s=self.budget_s,
                    memory_bytes=weights_room_bytes(device),
                    weights=weights,
                    shared=self.shared(worker),
                ),
            )
            for device in devices
        ]
        answers = self.pool.questions.ask(
            # The worker gives up first, and knows more.
            questions,
            silence_s=1.2 * self.silence_s,
            on_news=lambda worker, news: doing(worker.register.device, news.what),
        )
        return [_report(answer) for answer in answers]

    def steady(self, devices: Sequence[Device], seconds: float) -> list[float | PotluckError]:
        questions: list[tuple[PoolWorker, MeasureQuestion]] = [
            (self._worker(device), Steady(seconds=seconds)) for device in devices
        ]
        answers = self.pool.questions.ask(questions, silence_s=seconds + self.silence_s)
        return [_step_s(answer) for answer in answers]

    def end(self, devices: Sequence[Device]) -> None:
        for device in devices:
            self.pool.tell(self._worker(device), EndProfile())

    def _worker(self, device: Device) -> PoolWorker:
        for worker in self.pool.workers():
            if worker.register.device == device.name:
                return worker
        raise StageFailed(f"{device.name} has left the pool")


@dataclass(slots=True)
class ChildProbes:
    """By children of this process, for devices of this host."""

    budget_s: float = BUDGET_S
    silence_s: float = SILENCE_S
    _children: dict[str, ProfileProcess] = field(default_factory=dict)

    def machine(self, device: Device) -> str:
        return machine_facts(device.backend)

    def profile(
        self, devices: Sequence[Device], model: Path, weights: WeightsForm, doing: Doing
    ) -> list[ProfileReport | PotluckError]:
        def one(device: Device) -> ProfileReport | PotluckError:
            settings = ProfileSettings(
                backend=device.backend,
                device=device.kind,
                dtype=device.compute_dtype,
                budget_s=self.budget_s,
                memory_bytes=weights_room_bytes(device),
                weights=weights,
            )
            child = ProfileProcess(model, settings, threads=device.threads, silence_s=self.silence_s)
            self._children[device.name] = child
            try:
                return child.report(lambda what: doing(device.name, what))
            except PotluckError as error:
                self.end([device])
                return error

        with ThreadPoolExecutor(max_workers=len(devices)) as threads:
            return list(threads.map(one, devices))

    def steady(self, devices: Sequence[Device], seconds: float) -> list[float | PotluckError]:
        def one(device: Device) -> float | PotluckError:
            try:
                return self._children[device.name].steady(seconds)
            except PotluckError as error:
                return error

        with ThreadPoolExecutor(max_workers=len(devices)) as threads:
            return list(threads.map(one, devices))

    def end(self, devices: Sequence[Device]) -> None:
        for device in devices:
            child = self._children.pop(device.name, None)
            if child is not None:
                child.close()


def weights_room_bytes(device: Device) -> int:
    """What a profile's weights may take."""
    return max(0, device.free_bytes - runtime_reserve_bytes(device))


def _report(answer: MeasureAnswer | PotluckError) -> ProfileReport | PotluckError:
    match answer:
        case PotluckError():
            return answer
        case Profiled(report=report):
            try:
                return decode_report(report)
            except PotluckError as error:
                return error
    return StageFailed(f"its worker answered a profile with {type(answer).__name__}")


def _step_s(answer: MeasureAnswer | PotluckError) -> float | PotluckError:
    match answer:
        case PotluckError():
            return answer
        case SteadyTime(step_s=step_s) if 0.0 < step_s < math.inf:
            return step_s
    return StageFailed(f"its worker answered with {type(answer).__name__}")
