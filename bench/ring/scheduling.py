"""Is every device kept busy? Schedules over two stages of one thread each, at the engine's own socket.

python -m bench.ring.scheduling [--model smollm2] [--rounds 5] [--only single streams filled intrusion]
                           [--layers 15,15] [--json FILE]

single: one chat over two stages and over the engine unsplit. streams: 1 to 8 chats against what their steps allow.
filled: 4·B* chats against the slowest stage. intrusion: a prompt of 4,096 tokens beside 4 chats.

Everything is up first and then measured in turns, round after round, because machines drift; ratios are taken within a
round, and the medians over rounds are judged. Engines have processes of their own, as in `potluck up`. Rings driven
without an engine show what stages take and what hops cost.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.ring.driven_ring import driven_ring
from bench.ring.engine_ring import engine_ring, pool_of_processes
from bench.ring.sections import Prompts, filled, intrusion, single, streams
from bench.targets import SCHEDULING_TARGETS, Round, run_rounds
from potluck.engine.tokenizer import Tokenizer
from potluck.measure.result import hardware_facts, say, write_result
from potluck.measure.ring import unsplit_ring
from potluck.store.manifest import StoredModel
from potluck.store.store import Store
from potluck.system.paths import home_dir
from potluck.system.settings import Settings
from transport.errors import PotluckError

SECTIONS = ("single", "streams", "filled", "intrusion")
_NUM_STAGES = 2
_CONTEXT_TOKENS = 8192
_CONCURRENCY = 4
_MAX_STEP_TOKENS = 2048

Section = Callable[[int], Round]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingBench:
    """What is measured: one section after another, each with the round's number."""

    sections: dict[str, Section]
    about: dict[str, Any]


def build_bench(stack: ExitStack, model: StoredModel, wanted: Sequence[str], layers: Sequence[int]) -> SchedulingBench:
    """Start what the wanted sections need. Raises PotluckError, RuntimeError."""
    prompts = Prompts(Tokenizer(model.path), model.spec.vocab_size)
    pool = stack.enter_context(pool_of_processes(_NUM_STAGES))
    plan = pool.plan(model, settings(_NUM_STAGES, by_hand(layers)))
    split = [stage.num_layers for stage in plan.stages]
    sections: dict[str, Section] = {}
    ring = stack.enter_context(engine_ring("2 stages", pool, model, plan, prompts.eos_ids))
    if set(wanted) & {"streams", "filled"}:
        driven_pool = stack.enter_context(pool_of_processes(_NUM_STAGES))
        # Its workers have the same names: the same plan will do.
        driven = stack.enter_context(driven_ring(driven_pool, model, plan, max_step_tokens=_MAX_STEP_TOKENS))
        sections["streams"] = lambda number: streams(ring, driven, prompts)
        sections["filled"] = lambda number: filled(ring, driven, prompts)
    if "single" in wanted:
        alone = stack.enter_context(pool_of_processes(1))
        one = stack.enter_context(
            engine_ring("1 stage", alone, model, alone.plan(model, settings(1, None)), prompts.eos_ids)
        )
        torch.set_num_threads(1)
        unsplit = stack.enter_context(unsplit_ring(model.path, plan.stages[0].compute_dtype))
        sections["single"] = lambda number: single(unsplit, one, ring, number)
    sections["intrusion"] = lambda number: intrusion(ring, prompts)
    return SchedulingBench(
        sections={name: sections[name] for name in SECTIONS if name in wanted},
        about={"model": model.name, "layers": split, "dtype": plan.stages[0].compute_dtype},
    )


def settings(num_stages: int, layers: str | None) -> Settings:
    """Of a ring that uses all its devices, each a CPU worker, for chats of up to 8,192 tokens."""
    return Settings(
        device=("torch:cpu",) * num_stages,
        context=_CONTEXT_TOKENS,
        concurrency=_CONCURRENCY,
        use_all=True,
        objective="throughput",
        layers=layers,
    )


def by_hand(layers: Sequence[int]) -> str | None:
    """Layers for each CPU worker, as `--layers` takes them; None for none."""
    if len(layers) == 1:
        return f"cpu={layers[0]}"
    return ",".join(f"cpu-{number}={count}" for number, count in enumerate(layers, start=1)) or None


def run(bench: SchedulingBench, rounds: int) -> dict[str, Any]:
    """All sections, round after round. One that fails is noted and left out of its round."""
    failed: list[str] = []

    def measure(number: int) -> Round:
        values: Round = {}
        began_s, before = time.perf_counter(), cpu_seconds()
        for name, section in bench.sections.items():
            say(f"  {name}")
            try:
                values |= section(number)
            except (RuntimeError, ValueError) as error:
                say(f"  failed: {error}")
                failed.append(f"round {number + 1}, {name}: {error}")
        everyone, ours = (new - old for old, new in zip(before, cpu_seconds(), strict=True))
        values["cores used by others"] = max(0.0, everyone - ours) / (time.perf_counter() - began_s)
        return values

    return {**bench.about, **run_rounds(measure, rounds, "scheduling", SCHEDULING_TARGETS), "failed": failed}


def cpu_seconds() -> tuple[float, float]:
    """Of CPU time so far: this machine's, and that of this process with its children. What others took in a round shows
    whether it can be trusted."""
    times = psutil.cpu_times()
    me = psutil.Process()
    ours = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    everyone = times.user + times.nice + times.system
    return everyone, sum(one.user + one.system for one in ours)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a model of the store")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    parser.add_argument("--layers", default="", help='layers of the two stages, "15,15"; default: the planner\'s')
    parser.add_argument("--json", type=Path, default=None, help="also write the result to this file")
    options = parser.parse_args()

    try:
        layers = [int(count) for count in options.layers.split(",") if count]
        with ExitStack() as stack:
            model = Store(home_dir()).pull(options.model, lambda _: None)
            bench = build_bench(stack, model, options.only, layers)
            say(f"{model.name}: layers {bench.about['layers']}, {bench.about['dtype']}")
            result = {**hardware_facts(), **run(bench, options.rounds)}
    except (PotluckError, RuntimeError, OSError) as error:
        say(f"error: {error}")
        return 1
    write_result(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
