"""Measures one device in a process of its own: `python -P -m devices.hardware.probe --backend torch --device cpu
--json`.

With `--wait`, it says "ready" and starts to measure at the first line on standard input, so that several probes of a
host measure at the same moment: they share its memory bus.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from dataclasses import asdict

from devices.hardware.measure import BandwidthBenchmark, BandwidthMeasurement, measure
from transport.errors import PotluckError
from transport.process.child import EXIT_ORPHANED, read_pipe, thread_environment

READY = "ready"
_STDIN = 0
_POLL_S = 0.02
"""Probes of a host are to start within a moment."""


def main() -> int:
    arguments = _parser().parse_args()
    # From the very start: to import a library takes seconds, and a parent that crashes meanwhile can't end us.
    start = _watch_for_start() if arguments.wait else None
    os.environ.update(thread_environment(arguments.threads, os.environ))
    try:
        benchmark = _make_benchmark(arguments.backend, arguments.device, arguments.threads)
        if start is not None:
            print(READY, flush=True)
            start.wait()
        measured = measure(benchmark)
    except PotluckError as error:
        return _fail(error.message)
    except ImportError as error:
        return _fail(f"{arguments.backend} is not installed ({error})")
    except (RuntimeError, MemoryError) as error:
        return _fail(f"{arguments.backend} failed on {arguments.device}: {error}")
    print(json.dumps(asdict(measured)) if arguments.json else _summary(measured), flush=True)
    return 0


def _watch_for_start() -> threading.Event:
    """Set at the first line on standard input. When that ends, so has the parent, and this process with it."""
    go = threading.Event()

    def watch() -> None:
        while read_pipe(_STDIN, 64, poll_s=_POLL_S):
            go.set()
        os._exit(EXIT_ORPHANED)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    return go


def _make_benchmark(backend: str, kind: str, threads: int) -> BandwidthBenchmark:
    # Each library only where it is asked for; the thread variables must be set before it is loaded.
    if backend == "torch":
        from devices.hardware.probe_torch import TorchBenchmark

        return TorchBenchmark(kind, threads)
    from devices.hardware.probe_mlx import MlxBenchmark

    return MlxBenchmark()


def _fail(reason: str) -> int:
    print(" ".join(reason.split()), file=sys.stderr)
    return 1


def _summary(measured: BandwidthMeasurement) -> str:
    return f"{measured.bandwidth_bytes_per_s / 1e9:.1f} GB/s in {measured.compute_dtype}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="devices.hardware.probe", description="Measure one device.")
    parser.add_argument("--backend", choices=("torch", "mlx"), required=True)
    parser.add_argument("--device", required=True, help="cpu, cuda:0, mps or mlx")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--wait", action="store_true", help="measure only once a line comes in")
    return parser


if __name__ == "__main__":
    sys.exit(main())
