"""How does a model that is quantized on disk load and decode? A random one of the shape of Llama-3.2-3B, in 4 bits.

python -m bench.stage.loading [--threads 2] [--rounds 5] [--folder FOLDER] [--json FILE]
Written as an mlx-lm folder, the embedding in 4 bits too, and loaded whole by a process of its own: from the disk, then
again from the page cache. Memory counts from before loading: interpreter, libraries and kernels are not the stage's.
What a token reads, over its time, is held against the bandwidth of reading 1 GiB in the same process, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.stage.random_checkpoint import LlamaShape, forget_pages, write_quantized
from potluck.measure.child_process import SystemUnderTest
from potluck.measure.result import hardware_facts

_EVERY_S = 0.004


def status_bytes(pid: int | str, field: str) -> int:
    """`field` of /proc/PID/status: VmHWM, VmRSS, RssAnon, …"""
    return parse_status(Path(f"/proc/{pid}/status").read_text(), field)


def parse_status(text: str, field: str) -> int:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc tells no {field}")


@dataclass(slots=True)
class MemoryPeak:
    """Bytes of anonymous memory: at first, the most since, and at last."""

    before: int
    most: int
    after: int

    def above_before(self) -> int:
        return self.most - self.before


@contextmanager
def anonymous_peak(pid: int) -> Iterator[MemoryPeak]:
    """Look at the process's anonymous memory every few milliseconds: from here, so that it is not disturbed."""
    first = status_bytes(pid, "RssAnon")
    peak = MemoryPeak(first, first, first)
    stopping = threading.Event()

    def watch() -> None:
        while not stopping.wait(_EVERY_S):
            peak.most = max(peak.most, status_bytes(pid, "RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stopping.set()
        thread.join()
        peak.after = status_bytes(pid, "RssAnon")
        peak.most = max(peak.most, peak.after)


# Functions of the loader that do not call one another, and what they do. The rest is `other`.
_PARTS: Mapping[str, tuple[str, ...]] = {
    "reading files": ("read_exactly",),
    "unpacking bits": ("unpack_stream", "unpack_words"),
    "packing for the kernels": ("pack_rows",),
    "choosing offsets": ("best_numbers",),
    "checking numbers": ("fits_float16",),
}
MOST_MEMORY = 1.15
LEAST_BANDWIDTH = 0.6


def parts_of(spent_s: Mapping[str, float], total_s: float) -> dict[str, Any]:
    """Shares of a load's time, from cumulative seconds by function."""
    seconds = {part: sum(spent_s.get(name, 0.0) for name in names) for part, names in _PARTS.items()}
    seconds["other"] = total_s - sum(seconds.values())
    return {
        "total_s": round(total_s, 2),
        "shares": {part: round(value / total_s, 3) for part, value in seconds.items()},
    }


def verdicts(peak_over_stage: float, share_of_bandwidth: float) -> list[dict[str, Any]]:
    return [
        {
            "what": "anonymous peak while loading, over the stage's size",
            "value": round(peak_over_stage, 3),
            "at most": MOST_MEMORY,
            "met": peak_over_stage <= MOST_MEMORY,
        },
        {
            "what": "bytes a token reads over its time, as a share of the memory's bandwidth",
            "value": round(share_of_bandwidth, 3),
            "at least": LEAST_BANDWIDTH,
            "met": share_of_bandwidth >= LEAST_BANDWIDTH,
        },
    ]


LLAMA_3B = LlamaShape(
    hidden=3072, intermediate=8192, layers=28, heads=24, kv_heads=8, vocab=128256, tied=True, context=8192
)
_WARM_UP = LlamaShape(hidden=256, intermediate=256, layers=1, heads=2, kv_heads=1, vocab=128, tied=True)
_PROMPT, _TOKENS = 16, 16


def measure(shape: LlamaShape, folder: Path, *, bits: int, group: int, threads: int, rounds: int) -> dict[str, object]:
    model = folder / "model"
    if not (model / "model.safetensors.index.json").is_file():
        write_quantized(shape, model, bits=bits, group=group)
    warm_up = write_quantized(_WARM_UP, folder / "warm-up", bits=bits, group=group)
    file_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    with SystemUnderTest(
        "loading", "bench.stage.loading_child", [str(model), str(warm_up), str(threads)], threads=threads
    ) as child:
        forget_pages(model)
        read_s = child.call("read_files")["read_s"]
        forget_pages(model)
        with anonymous_peak(child.pid) as peak:
            first = child.call("load")
        steps_s, bandwidths, shares = [], [], []
        for _ in range(rounds):
            bandwidth = child.call("bandwidth")["bytes_per_s"]
            decoded = child.call("decode", num_prompt=_PROMPT, num_tokens=_TOKENS)
            bandwidth = (bandwidth + child.call("bandwidth")["bytes_per_s"]) / 2
            steps_s.append(decoded["step_s"])
            bandwidths.append(bandwidth)
            shares.append((first["weights_bytes"] + decoded["kv_bytes"]) / decoded["step_s"] / bandwidth)
        child.call("unload")
        second = child.call("load")
        child.call("unload")
        profile = child.call("profile")
    stage_bytes = first["weights_bytes"]
    share = statistics.median(shares)
    return {
        "bits": bits,
        "group": group,
        "threads": threads,
        "file_bytes": file_bytes,
        "stage_bytes": stage_bytes,
        "files_alone_s": round(read_s, 2),
        "load_s": round(first["load_s"], 2),
        "load_gb_per_s": round(file_bytes / first["load_s"] / 1e9, 3),
        "load_again_s": round(second["load_s"], 2),
        "load_again_gb_per_s": round(file_bytes / second["load_s"] / 1e9, 3),
        "anonymous_peak_bytes": peak.above_before(),
        "anonymous_after_bytes": peak.after - peak.before,
        "resident_peak_bytes": first["resident_peak_bytes"],
        "tokens_per_s": round(1 / statistics.median(steps_s), 2),
        "read_gb_per_s": round(stage_bytes / statistics.median(steps_s) / 1e9, 2),
        "memory_gb_per_s": round(statistics.median(bandwidths) / 1e9, 2),
        "share_of_bandwidth_min_max": [round(min(shares), 3), round(max(shares), 3)],
        "targets": verdicts(peak.above_before() / stage_bytes, share),
        "one_thread_load": profile,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=[2, 3, 4, 5, 6, 8], default=4)
    parser.add_argument("--group", type=int, choices=[32, 64, 128], default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LLAMA_3B.layers, help="fewer, for a quick look")
    parser.add_argument("--folder", type=Path, default=None, help="keep the checkpoint there for another run")
    parser.add_argument("--json", type=Path, default=None, help="also write the result to this file")
    options = parser.parse_args(arguments)
    shape = replace(LLAMA_3B, layers=options.layers)
    with tempfile.TemporaryDirectory(prefix="potluck-loading-") as scratch:
        found = measure(
            shape,
            options.folder or Path(scratch),
            bits=options.bits,
            group=options.group,
            threads=options.threads,
            rounds=options.rounds,
        )
    result = {**hardware_facts(), **found}
    print(json.dumps(result, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
