"""Is a worker's memory its own share? Loads a random checkpoint over three real workers and reads their peaks.

python -m bench.stage.memory [--gigabytes 4.2] [--json FILE]
The peak is VmHWM of /proc, above that of a worker that has loaded next to nothing, as a share of all the weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from bench.stage.loading import status_bytes
from bench.stage.random_checkpoint import LlamaShape, write_checkpoint
from potluck.head.pool import Pool, PoolWorker
from potluck.measure.result import hardware_facts, write_result
from potluck.measure.ring import stage_device, stage_loads, worker_pool
from shard.formats.spec import Backend
from shard.pieces.open import open_checkpoint
from transport.messages.control import Load
from transport.messages.ring import Fence

_BASE = LlamaShape(hidden=2048, intermediate=5632, layers=6, heads=16, kv_heads=8, vocab=8192)
_NOTHING = LlamaShape(hidden=64, intermediate=64, layers=3, heads=4, kv_heads=2, vocab=64)


def shape_of(num_bytes: float) -> LlamaShape:
    """Three equal stages: the number of layers is a multiple of three; a small vocabulary keeps the ends alike."""
    empty = LlamaShape(hidden=2048, intermediate=5632, layers=0, heads=16, kv_heads=8, vocab=8192)
    per_layer = (_BASE.num_bytes() - empty.num_bytes()) / _BASE.layers
    layers = max(3, 3 * round((num_bytes - empty.num_bytes()) / per_layer / 3 + 0.5))
    return LlamaShape(hidden=2048, intermediate=5632, layers=layers, heads=16, kv_heads=8, vocab=8192)


def measure(num_bytes: float, folder: Path, *, backend: Backend = "torch") -> dict[str, object]:
    """Peak resident memory of each worker above an empty one, in bytes and as a share of the weights."""
    shape = shape_of(num_bytes)
    big = write_checkpoint(shape, folder / "big")
    nothing = write_checkpoint(_NOTHING, folder / "nothing")
    empty = min(_load_peaks(nothing, backend))
    peaks = _load_peaks(big, backend)
    weights = shape.num_bytes()
    return {
        "weights_bytes": weights,
        "layers": shape.layers,
        "backend": backend,
        "empty_worker_bytes": empty,
        "peak_bytes": peaks,
        "share_of_weights": [round((peak - empty) / weights, 4) for peak in peaks],
    }


def _load_peaks(model: Path, backend: Backend) -> list[int]:
    num_layers = open_checkpoint(model).spec.num_layers
    thirds = [num_layers * index // 3 for index in range(4)]
    devices = [stage_device(f"{backend}-{index}", backend, "bfloat16") for index in range(3)]
    with worker_pool(devices) as (_, pool, _):
        loads = stage_loads(Fence("bench", 1, "memory"), model, thirds, "bfloat16")
        # Nobody says where to send, so that loading does not end: wait for the weights.
        _load_weights(pool, list(zip(pool.workers(), loads, strict=True)))
        return [status_bytes(worker.register.pid, "VmHWM") for worker in pool.workers()]


def _load_weights(pool: Pool, loads: list[tuple[PoolWorker, Load]]) -> None:
    class _Read(Exception):
        pass

    def tick(workers: object) -> None:
        progress = [worker.loading for worker, _ in loads]
        if all(item is not None and item.read_bytes >= item.total_bytes for item in progress):
            raise _Read

    try:
        pool.start_loading(loads)
        pool.wait_until_loaded([worker for worker, _ in loads], on_loading=tick)
    except _Read:
        return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.2)
    parser.add_argument("--backend", choices=["torch", "mlx"], default="torch")
    parser.add_argument("--json", type=Path, default=None, help="also write the result to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="potluck-memory-") as folder:
        result = {**hardware_facts(), **measure(options.gigabytes * 1e9, Path(folder), backend=options.backend)}
    write_result(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
