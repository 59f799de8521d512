"""How does a model that is quantized on disk load and decode? A random one of the shape of Llama-3.2-3B, in 4 bits.

python -m bench.loading [--threads 2] [--rounds 5] [--folder FOLDER] [--json FILE]
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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.contestant import Contestant
from bench.hardware import facts
from bench.loading_report import verdicts
from bench.process_memory import anonymous_peak
from bench.random_checkpoint import LlamaShape
from bench.random_quantized import forget_pages, write_quantized

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
    with Contestant(
        "loading", "bench.loading_child", [str(model), str(warm_up), str(threads)], threads=threads
    ) as child:
        forget_pages(model)
        read_s = child.ask("read_files")["read_s"]
        forget_pages(model)
        with anonymous_peak(child.pid) as peak:
            first = child.ask("load")
        steps_s, bandwidths, shares = [], [], []
        for _ in range(rounds):
            bandwidth = child.ask("bandwidth")["bytes_per_s"]
            decoded = child.ask("decode", num_prompt=_PROMPT, num_tokens=_TOKENS)
            bandwidth = (bandwidth + child.ask("bandwidth")["bytes_per_s"]) / 2
            steps_s.append(decoded["step_s"])
            bandwidths.append(bandwidth)
            shares.append((first["weights_bytes"] + decoded["kv_bytes"]) / decoded["step_s"] / bandwidth)
        child.ask("unload")
        second = child.ask("load")
        child.ask("unload")
        profile = child.ask("profile")
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
    result = {**facts(), **found}
    print(json.dumps(result, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
