"""How does a model that is quantized on disk load and decode? A random one of the shape of Llama-3.2-3B, in 4 bits.

python -m bench.stage.loading [--threads 2] [--rounds 5] [--folder FOLDER] [--json FILE]
Written as an mlx-lm folder, the embedding in 4 bits too, and loaded whole by a process of its own: from the disk, then
again from the page cache. Memory counts from before loading: interpreter, libraries and kernels are not the stage's.
What a token reads, over its time, is held against the bandwidth of reading 1 GiB in the same process, in turns.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import os
import pstats
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.stage.random_checkpoint import LlamaShape, forget_pages, write_quantized
from bench.targets import Target, judge_targets
from potluck.measure.child_process import SystemUnderTest, reply_pipe, serve_commands
from potluck.measure.result import hardware_facts, write_result
from potluck.measure.ring import load_whole
from shard.stage import Batch, ShardBackend
from transport.messages.ring import Entry, SequenceId

_EVERY_S = 0.004
_CHILD = "--child"


def status_bytes(pid: int | str, field: str) -> int:
    """`field` of /proc/PID/status: VmHWM, VmRSS, RssAnon, …"""
    return parse_status(Path(f"/proc/{pid}/status").read_text(), field)


def parse_status(text: str, field: str) -> int:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/PID/status has no field {field}")


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


TARGETS = (
    Target(
        name="anonymous peak while loading, over the stage's size",
        limit=MOST_MEMORY,
        sense="at most",
        value=lambda found: found["peak over stage"],
    ),
    Target(
        name="bytes a token reads over its time, as a share of the memory's bandwidth",
        limit=LEAST_BANDWIDTH,
        sense="at least",
        value=lambda found: found["share of bandwidth"],
    ),
)


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
        "loading", "bench.stage.loading", [_CHILD, str(model), str(warm_up), str(threads)], threads=threads
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
        "targets": judge_targets(
            [{"peak over stage": peak.above_before() / stage_bytes, "share of bandwidth": share}], TARGETS
        ),
        "one_thread_load": profile,
    }


_ONE = SequenceId(1)
_READ_BYTES = 1 << 23
_BANDWIDTH_ELEMENTS = 1 << 28
_RESET_PEAK = "5"


class LoadingProbe:
    def __init__(self, model: Path, warm_up: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = model
        self._threads = threads
        self._shard: ShardBackend | None = load_whole(warm_up, "bfloat16")
        self.decode(2, 2)
        self.unload()
        self._much: torch.Tensor | None = None

    def load(self) -> dict[str, Any]:
        """Seconds, the stage's bytes, and the growth of the resident peak."""
        before = status_bytes("self", "VmRSS")
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        started = time.perf_counter()
        shard = load_whole(self._model, "bfloat16")
        load_s = time.perf_counter() - started
        self._shard = shard
        grown = status_bytes("self", "VmHWM") - before
        return {"load_s": load_s, "weights_bytes": shard.weights_bytes, "resident_peak_bytes": grown}

    def unload(self) -> dict[str, Any]:
        self._shard = None
        gc.collect()
        return {}

    def decode(self, num_prompt: int, num_tokens: int) -> dict[str, Any]:
        """Median seconds of a greedy step after a prompt of so many tokens, and the bytes of KV at the end."""
        shard = self._shard
        assert shard is not None
        prompt = tuple(range(2, 2 + num_prompt))
        token = int(shard.forward(Batch(entries=(Entry(_ONE, 0, prompt, 1),), hidden=None))[0].argmax())
        steps_s = []
        for position in range(num_prompt, num_prompt + num_tokens):
            started = time.perf_counter()
            logits = shard.forward(Batch(entries=(Entry(_ONE, position, (token,), 1),), hidden=None))
            token = int(logits[0].argmax())
            steps_s.append(time.perf_counter() - started)
        kv_bytes = shard.kv.num_bytes()
        shard.kv.release(_ONE)
        return {"step_s": statistics.median(steps_s), "kv_bytes": kv_bytes}

    def bandwidth(self) -> dict[str, Any]:
        """Bytes per second of reading 1 GiB, the median of three: the largest of its numbers, by all threads."""
        if self._much is None:
            self._much = torch.full((_BANDWIDTH_ELEMENTS,), 0.01)
            self._much.max()
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            self._much.max()
            seconds.append(time.perf_counter() - started)
        return {"bytes_per_s": self._much.nbytes / statistics.median(seconds)}

    def read_files(self) -> dict[str, Any]:
        """Seconds to read the files and do nothing with them."""
        buffer = bytearray(_READ_BYTES)
        started = time.perf_counter()
        for path in sorted(self._model.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return {"read_s": time.perf_counter() - started}

    def profile(self) -> dict[str, Any]:
        """Where a load on one thread spends its time."""
        torch.set_num_threads(1)
        profile = cProfile.Profile()
        shard = profile.runcall(load_whole, self._model, "bfloat16")
        torch.set_num_threads(self._threads)
        del shard
        stats = pstats.Stats(profile)
        spent = {name: times[3] for (_, _, name), times in stats.stats.items()}  # type: ignore[attr-defined]
        return parts_of(spent, stats.total_tt)  # type: ignore[attr-defined]


def serve_probe(model: str, warm_up: str, threads: str) -> None:
    """The child. The warm-up model is loaded first and let go: libraries and compiled kernels are not the stage's."""
    replies = reply_pipe()
    probe = LoadingProbe(Path(model), Path(warm_up), int(threads))
    names = ("load", "unload", "decode", "bandwidth", "read_files", "profile")
    handlers = {name: getattr(probe, name) for name in names}
    serve_commands(handlers, {"threads": torch.get_num_threads(), "pid": os.getpid()}, replies)


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == [_CHILD]:
        serve_probe(*arguments[1:])
        return 0
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
    write_result(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
