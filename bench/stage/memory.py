"""Is a worker's memory its own share? Loads a random checkpoint over three real workers and reads their peaks.

python -m bench.stage.memory [--gigabytes 4.2] [--json FILE]
The peak is VmHWM of /proc, above that of a worker that has loaded next to nothing, as a share of all the weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import zmq

from bench.stage.random_checkpoint import LlamaShape, write_checkpoint
from devices.hardware.device import Device
from potluck.head.pool import Pool, PoolWorker
from potluck.host.local_host import ThisHost
from potluck.host.node import Node
from potluck.measure.result import hardware_facts
from shard.pieces.open import open_checkpoint
from transport.messages.control import Load
from transport.messages.ring import Fence, StageSpec

_BASE = LlamaShape(hidden=2048, intermediate=5632, layers=6, heads=16, kv_heads=8, vocab=8192)
_NOTHING = LlamaShape(hidden=64, intermediate=64, layers=3, heads=4, kv_heads=2, vocab=64)


def shape_of(num_bytes: float) -> LlamaShape:
    """Three equal stages: the number of layers is a multiple of three; a small vocabulary keeps the ends alike."""
    empty = LlamaShape(hidden=2048, intermediate=5632, layers=0, heads=16, kv_heads=8, vocab=8192)
    per_layer = (_BASE.num_bytes() - empty.num_bytes()) / _BASE.layers
    layers = max(3, 3 * round((num_bytes - empty.num_bytes()) / per_layer / 3 + 0.5))
    return LlamaShape(hidden=2048, intermediate=5632, layers=layers, heads=16, kv_heads=8, vocab=8192)


def measure(num_bytes: float, folder: Path, *, backend: str = "torch") -> dict[str, object]:
    """Peak resident memory of each worker above an empty one, in bytes and as a share of the weights."""
    shape = shape_of(num_bytes)
    big = write_checkpoint(shape, folder / "big")
    nothing = write_checkpoint(_NOTHING, folder / "nothing")
    empty = min(_load_peaks(nothing, backend, folder / "logs-empty"))
    peaks = _load_peaks(big, backend, folder / "logs")
    weights = shape.num_bytes()
    return {
        "weights_bytes": weights,
        "layers": shape.layers,
        "backend": backend,
        "empty_worker_bytes": empty,
        "peak_bytes": peaks,
        "share_of_weights": [round((peak - empty) / weights, 4) for peak in peaks],
    }


def _load_peaks(model: Path, backend: str, logs: Path) -> list[int]:
    logs.mkdir(parents=True, exist_ok=True)
    spec = open_checkpoint(model).spec
    thirds = [spec.num_layers * index // 3 for index in range(4)]
    run_dir = Path(tempfile.mkdtemp(prefix="pl-"))
    with zmq.Context() as context:
        pool = Pool(
            context,
            run_dir,
            on_fault=lambda worker, error: None,
            on_joined=lambda worker: None,
            here=ThisHost(name="bench"),
        )
        node = Node(control=pool.endpoint, logs=logs, run_dir=run_dir, on_exit=pool.on_worker_exit)
        try:
            node.start([_device(f"{backend}-{index}", backend) for index in range(3)])
            pool.wait_for_devices([worker.device.name for worker in node.workers], 3, 60.0)
            workers = pool.workers()
            fence = Fence("bench", 1, "memory")
            loads = []
            for index, worker in enumerate(workers):
                loads.append((worker, _load(model, fence, index, thirds, backend)))
            # Nobody says where to send, so that loading does not end: wait for the weights.
            _load_weights(pool, loads)
            return [_peak_bytes(worker.register.pid) for worker in workers]
        finally:
            node.stop()
            pool.close()
            shutil.rmtree(run_dir, ignore_errors=True)


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


def _load(model: Path, fence: Fence, index: int, thirds: list[int], backend: str) -> Load:
    return Load(
        fence=fence,
        stage=index,
        spec=StageSpec(
            first=thirds[index],
            last=thirds[index + 1],
            num_layers=thirds[-1],
            device=backend,
            compute_dtype="bfloat16",
            wire_dtype="bfloat16",
            next_dtype="bfloat16",
            context_tokens=1024,
            kv_capacity_tokens=1024,
        ),
        model_path=str(model),
        max_step_tokens=1024,
        listen="local",
    )


def _device(name: str, backend: str) -> Device:
    return Device(
        name=name,
        backend="mlx" if backend == "mlx" else "torch",
        kind="mlx" if backend == "mlx" else "cpu",
        host="bench",
        threads=1,
        free_bytes=2**40,
        total_bytes=2**40,
        memory_pool="bench",
        bandwidth_bytes_per_s=1e10,
        compute_dtype="bfloat16",
    )


def _peak_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no VmHWM for process {pid}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.2)
    parser.add_argument("--backend", choices=["torch", "mlx"], default="torch")
    parser.add_argument("--json", type=Path, default=None, help="also write the result to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="potluck-memory-") as folder:
        result = {**hardware_facts(), **measure(options.gigabytes * 1e9, Path(folder), backend=options.backend)}
    print(json.dumps(result, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
