"""A benchmark's clock measures memory bandwidth, and a noisy measurement is taken again some other time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from msgspec import Struct

from transport.messages.ring import DType
from transport.process.cpu_use import CpuUse

WARM_UP_S = 0.2
MEASURE_S = 0.8
MATRIX_BYTES = 32 << 20
TOTAL_BYTES = 256 << 20
"""Together far beyond the last-level cache of home machines, so that memory is what is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BandwidthMeasurement:
    """`limit_bytes`: what the device's own memory, or its driver's limit within the host's, leaves free; None: all of
    the host's. `uses_host_memory` is true for CPUs and unified memory. `gpu` is a stable id (empty elsewhere).
    `busy_cores` is how many cores all programs kept busy meanwhile, `own_cores` how many the probe did."""

    bandwidth_bytes_per_s: float
    compute_dtype: DType
    uses_host_memory: bool
    limit_bytes: int | None
    gpu: str
    busy_cores: float = 0.0
    own_cores: float = 0.0


class BandwidthBenchmark(Protocol):
    """A device made ready: `run` multiplies a vector by all matrices, to the end, and returns the bytes read."""

    compute_dtype: DType
    uses_host_memory: bool
    limit_bytes: int | None
    gpu: str

    def run(self) -> int: ...


def measure(benchmark: BandwidthBenchmark, clock: Callable[[], float] = time.perf_counter) -> BandwidthMeasurement:
    """Bytes per second over MEASURE_S, after a warm-up."""
    _run_for(benchmark, WARM_UP_S, clock)
    use = CpuUse()
    read_bytes, elapsed_s = _run_for(benchmark, MEASURE_S, clock)
    busy_cores, own_cores = use.cores()
    return BandwidthMeasurement(
        bandwidth_bytes_per_s=read_bytes / elapsed_s,
        compute_dtype=benchmark.compute_dtype,
        uses_host_memory=benchmark.uses_host_memory,
        limit_bytes=benchmark.limit_bytes,
        gpu=benchmark.gpu,
        busy_cores=busy_cores,
        own_cores=own_cores,
    )


def _run_for(benchmark: BandwidthBenchmark, seconds: float, clock: Callable[[], float]) -> tuple[int, float]:
    started, read_bytes = clock(), 0
    while (elapsed_s := clock() - started) < seconds or read_bytes == 0:
        read_bytes += benchmark.run()
    return read_bytes, elapsed_s


NOISY_SHARE = 0.15
"""Other programs that had more of the cores' time than this may have made what was measured slower."""

_REMEASURE_AFTER_S = 600.0
"""Before that they are probably still there."""

_MAX_TRIES = 3
"""Where it is never quiet, times with what is always there are the true ones."""


def is_noisy(others_share: float) -> bool:
    return others_share > NOISY_SHARE


class NoisyMeasurement(Struct, frozen=True, kw_only=True):
    """Other programs disturbed a measurement, at `kept_s` (seconds since 1970), for the `num_tries`th time."""

    kept_s: float
    num_tries: int

    def is_due(self, now_s: float) -> bool:
        """Whether to measure again now."""
        return self.num_tries < _MAX_TRIES and not 0 <= now_s - self.kept_s < _REMEASURE_AFTER_S
