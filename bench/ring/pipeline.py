"""What does splitting cost? One stream over 1, 2 and 3 stages against the same engine unsplit in one process.

python -m bench.ring.pipeline [--model smollm2] [--tokens 64] [--rounds 5] [--dtype float32] [--json FILE]
The engine is the same code in this process every time. Unsplit, its one stage is a thread here, over links in memory;
split, each stage is a real worker process behind ZeroMQ. All have one thread. Everything is loaded first and then run
in turns, round after round, because the machine drifts; ratios are medians over rounds of ratios within a round.

A hop's software cost is (a step's round trip - the stages' compute) / (stages + 1), the median over decode steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from potluck.measure.result import hardware_facts, write_result
from potluck.measure.ring import PROMPT, BenchRing, RunResult, split_ring, unsplit_ring
from potluck.store.store import Store
from potluck.system.paths import home_dir
from transport.messages.ring import DType


def measure(model: Path, *, dtype: DType, num_tokens: int, rounds: int, max_stages: int) -> dict[str, object]:
    torch.set_num_threads(1)
    with ExitStack() as stack:
        rings: list[BenchRing] = [stack.enter_context(unsplit_ring(model, dtype))]
        rings += [stack.enter_context(split_ring(model, dtype, stages)) for stages in range(1, max_stages + 1)]
        for ring in rings:
            ring.run(PROMPT, num_tokens)  # warm
        results: list[list[RunResult]] = [[] for _ in rings]
        for _ in range(rounds):
            for ring, found in zip(rings, results, strict=True):
                found.append(ring.run(PROMPT, num_tokens))
    return {
        "model": model.name,
        "dtype": dtype,
        "prompt_tokens": results[0][0].prompt_tokens,
        "output_tokens": num_tokens,
        "rounds": rounds,
        "rows": [_row(ring.name, found, results[0]) for ring, found in zip(rings, results, strict=True)],
    }


def _row(name: str, found: Sequence[RunResult], unsplit: Sequence[RunResult]) -> dict[str, object]:
    ratios = [run.tokens_per_s / base.tokens_per_s for run, base in zip(found, unsplit, strict=True)]
    return {
        "ring": name,
        "tokens_per_s": round(statistics.median(run.tokens_per_s for run in found), 2),
        "of_unsplit": round(statistics.median(ratios), 3),
        "of_unsplit_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
        "ttft_s": round(statistics.median(run.ttft_s for run in found), 3),
        "stage_ms": [round(seconds * 1e3, 2) for seconds in found[-1].stage_p50_s],
        "hop_p50_us": round(statistics.median(run.hop_p50_s for run in found) * 1e6),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a model of the store")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stages", type=int, default=3, help="the longest ring")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path, default=None, help="also write the result to this file")
    options = parser.parse_args()
    found = measure(
        Store(home_dir()).pull(options.model, lambda _: None).path,
        dtype=options.dtype,
        num_tokens=options.tokens,
        rounds=options.rounds,
        max_stages=options.stages,
    )
    result = {**hardware_facts(), **found}
    write_result(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
