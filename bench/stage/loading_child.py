"""Loads a stage, decodes, and reads memory, on command. python -m bench.stage.loading_child MODEL WARM-UP-MODEL THREADS

The warm-up model is loaded first and let go: libraries and compiled kernels are not the stage's.
"""

from __future__ import annotations

import cProfile
import gc
import os
import pstats
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.stage.loading import parts_of, status_bytes
from bench.stage.logits import load_whole
from potluck.measure.child_process import reply_pipe, serve_commands
from shard.stage import Batch, ShardBackend
from transport.messages.ring import Entry, SequenceId

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


def main() -> int:
    replies = reply_pipe()
    model, warm_up, threads = sys.argv[1:]
    loading = LoadingProbe(Path(model), Path(warm_up), int(threads))
    handlers = {
        name: getattr(loading, name) for name in ("load", "unload", "decode", "bandwidth", "read_files", "profile")
    }
    serve_commands(handlers, {"threads": torch.get_num_threads(), "pid": os.getpid()}, replies)
    return 0


if __name__ == "__main__":
    sys.exit(main())
