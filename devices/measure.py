"""The clock of a probe, and what it found."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from transport.cpu_use import CpuUse
from transport.messages import DType

WARM_UP_S = 0.2
MEASURE_S = 0.8
MATRIX_BYTES = 32 << 20
TOTAL_BYTES = 256 << 20
"""Together far beyond the last-level cache of home machines, so that memory is what is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
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


class Bench(Protocol):
    """A device made ready: `run` multiplies a vector by all matrices, to the end, and returns the bytes read."""

    compute_dtype: DType
    uses_host_memory: bool
    limit_bytes: int | None
    gpu: str

    def run(self) -> int: ...


def measure(bench: Bench, clock: Callable[[], float] = time.perf_counter) -> Measured:
    """Bytes per second over MEASURE_S, after a warm-up."""
    _run_for(bench, WARM_UP_S, clock)
    use = CpuUse()
    read_bytes, elapsed_s = _run_for(bench, MEASURE_S, clock)
    busy_cores, own_cores = use.cores()
    return Measured(
        bandwidth_bytes_per_s=read_bytes / elapsed_s,
        compute_dtype=bench.compute_dtype,
        uses_host_memory=bench.uses_host_memory,
        limit_bytes=bench.limit_bytes,
        gpu=bench.gpu,
        busy_cores=busy_cores,
        own_cores=own_cores,
    )


def _run_for(bench: Bench, seconds: float, clock: Callable[[], float]) -> tuple[int, float]:
    started, read_bytes = clock(), 0
    while (elapsed_s := clock() - started) < seconds or read_bytes == 0:
        read_bytes += bench.run()
    return read_bytes, elapsed_s
