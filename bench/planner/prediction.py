"""How right is the planner? In a lab of three hosts: predictions frozen before measuring, for at least six plans.

python -m bench.planner.prediction [--lab FILE] [--model smollm2 | --random-1b FOLDER] [--rounds 3] [--chats 8]
                           [--context 1024] --json FILE

Each visit to a plan starts the pool anew in the lab, measures devices and links anew, notes what the plan predicts
before anything has run, and then measures one chat and many. Visits to different plans take turns, round after round,
because the machine drifts. The chats are those that are planned for. The first host of the lab is the head; clients are
on its network, without its limits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench.lab import Lab, LabError, LabSpec, head_options, join_options, load_spec, pair_hosts
from bench.stage.random_checkpoint import LlamaShape, write_checkpoint
from potluck.head.planning import profile_of, workload_of
from potluck.measure.head_process import CommandProcess
from potluck.measure.result import hardware_facts, say, write_result
from potluck.store.manifest import StoredModel
from potluck.store.store import Store
from potluck.system.paths import home_dir
from potluck.system.settings import Settings
from transport.errors import PotluckError


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTrial:
    """One plan, once. `predicted` was noted before `measured` (one chat, many chats); `failed` says why there is none.

    `stages` are (device, first, last)."""

    plan: str
    round: int
    started: float
    stages: list[list[Any]] = field(default_factory=list)
    predicted: dict[str, Any] = field(default_factory=dict)
    measured: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None

    @property
    def predicted_rates(self) -> tuple[float, float]:
        """Tokens per second of one chat and of many."""
        return self.predicted["tokens_per_s"], self.predicted["tokens_per_s_many"]

    @property
    def measured_rates(self) -> tuple[float, float]:
        one, many = self.measured
        return one["decode_tokens_per_s"], many["decode_tokens_per_s"]

    @property
    def with_prompts(self) -> tuple[float, float]:
        """Tokens per second of many chats, prompts included, which is what throughput is after: predicted, measured."""
        return self.predicted["workload_tokens_per_s"], self.measured[1]["tokens_per_s"]

    @property
    def errors(self) -> tuple[float, float]:
        """Predicted over measured, less one."""
        one, many = (p / m - 1 for p, m in zip(self.predicted_rates, self.measured_rates, strict=True))
        return one, many


def summary(visits: Sequence[PlanTrial]) -> dict[str, Any]:
    """Medians over rounds for every plan that worked, over plans for all, and the visits themselves.

    Plans that came out alike are one; what was asked for is in `asked`.
    """
    done = [visit for visit in visits if visit.failed is None]
    plans = [_plan(name, [visit for visit in done if _layout(visit) == name]) for name in _unique(_layout, done)]
    medians: dict[str, Any] = {"plans": len(plans)}
    if plans:
        medians |= {
            "abs_error_one": statistics.median(abs(plan["error_one"]) for plan in plans),
            "abs_error_many": statistics.median(abs(plan["error_many"]) for plan in plans),
            "abs_error_with_prompts": statistics.median(abs(plan["error_with_prompts"]) for plan in plans),
            "latency_of_best": _share_of_best(
                plans, done, "latency", "measured_one", lambda one: one.measured_rates[0]
            ),
            "throughput_of_best": _share_of_best(
                plans, done, "throughput", "measured_with_prompts", lambda one: one.with_prompts[1]
            ),
            "throughput_of_best_decoding": _share_of_best(
                plans, done, "throughput", "measured_many", lambda one: one.measured_rates[1]
            ),
        }
    return {"medians": medians, "plans": plans, "visits": [asdict(visit) for visit in visits]}


def _plan(layout: str, visits: Sequence[PlanTrial]) -> dict[str, Any]:
    def median(value: Callable[[PlanTrial], float]) -> float:
        return statistics.median(value(visit) for visit in visits)

    return {
        "stages": layout,
        "asked": _unique(lambda visit: visit.plan, visits),
        "visits": len(visits),
        "predicted_one": median(lambda visit: visit.predicted_rates[0]),
        "measured_one": median(lambda visit: visit.measured_rates[0]),
        "error_one": median(lambda visit: visit.errors[0]),
        "predicted_many": median(lambda visit: visit.predicted_rates[1]),
        "measured_many": median(lambda visit: visit.measured_rates[1]),
        "error_many": median(lambda visit: visit.errors[1]),
        "predicted_with_prompts": median(lambda visit: visit.with_prompts[0]),
        "measured_with_prompts": median(lambda visit: visit.with_prompts[1]),
        "error_with_prompts": median(lambda visit: visit.with_prompts[0] / visit.with_prompts[1] - 1),
    }


def _share_of_best(
    plans: Sequence[dict[str, Any]],
    visits: Sequence[PlanTrial],
    asked: str,
    name: str,
    rate: Callable[[PlanTrial], float],
) -> float | None:
    """What the visits to recommended plans gave (they need not be the same in every round), as a share of the best
    plan's median; `name` is that of `rate` in a plan's row."""
    recommended = [rate(visit) for visit in visits if visit.plan == asked]
    best = max(plan[name] for plan in plans)
    return float(statistics.median(recommended) / best) if recommended else None


def _layout(visit: PlanTrial) -> str:
    return ",".join(f"{device}={last - first}" for device, first, last in visit.stages)


def _unique(key: Callable[[PlanTrial], str], visits: Sequence[PlanTrial]) -> list[str]:
    return list(dict.fromkeys(key(visit) for visit in visits))


LLAMA_1B = LlamaShape(
    hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, vocab=128256, tied=True, context=8192
)
_LAB = Path(__file__).parents[1] / "lab" / "specs" / "three-hosts.toml"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_STARTS_WITHIN_S = 60.0
_UP_WITHIN_S = 1200.0
_MEASURED_WITHIN_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChoice:
    """How a plan is asked for: options of `potluck up`."""

    name: str
    options: tuple[str, ...]


def plan_choices(devices: Sequence[str], num_layers: int) -> list[PlanChoice]:
    """What the planner recommends and its simple rules, and splits by hand that are neither."""
    first, second, third = devices
    half, third_part, fifth = num_layers // 2, num_layers // 3, max(1, num_layers // 5)

    def by_hand(*counts: tuple[str, int]) -> PlanChoice:
        text = ",".join(f"{device}={count}" for device, count in counts)
        return PlanChoice(name=text, options=("--layers", text))

    return [
        *(PlanChoice(name=rule, options=("--objective", rule)) for rule in ("latency", "throughput", "auto")),
        PlanChoice(name="proportional", options=("--objective", "proportional", "--use-all")),
        PlanChoice(name="even", options=("--objective", "even")),
        by_hand((first, num_layers)),
        by_hand((first, half), (second, num_layers - half)),
        by_hand((first, num_layers - fifth), (third, fifth)),
        by_hand((second, third_part), (first, num_layers - third_part)),
        by_hand((third, fifth), (first, num_layers - 2 * fifth), (second, fifth)),
    ]


class PredictionExperiment:
    """The lab that is up, and visits to plans in it."""

    def __init__(self, lab: Lab, spec: LabSpec, model: StoredModel, *, chats: int, context: int) -> None:
        self._context = context
        self._lab = lab
        self._names = [host.name for host in spec.hosts]
        self._pairing_address = pair_hosts(lab, self._names[0], self._names[1:])
        self._model = model
        self._chats = chats

    @property
    def devices(self) -> list[str]:
        return ["cpu", *(f"{name}/cpu" for name in self._names[1:])]

    def run_trial(self, choice: PlanChoice, number: int) -> PlanTrial:
        """Predict, then measure. What goes wrong is in the visit's `failed`."""
        started = time.time()
        try:
            with ExitStack() as stack:
                head = self._start(stack, choice)
                predicted = head["plan"]
                stages = [[stage["device"], stage["first"], stage["last"]] for stage in head["stages"]]
                say(f"  {stages}: predicts {predicted['tokens_per_s']:.2f} and {predicted['tokens_per_s_many']:.2f}")
                rows = self._measure()
        except RuntimeError as error:
            say(f"  failed: {error}")
            return PlanTrial(plan=choice.name, round=number, started=started, failed=str(error))
        one, many = rows
        say(f"  measured {one['decode_tokens_per_s']:.2f} and {many['decode_tokens_per_s']:.2f}")
        return PlanTrial(
            plan=choice.name, round=number, started=started, stages=stages, predicted=predicted, measured=rows
        )

    def _start(self, stack: ExitStack, choice: PlanChoice) -> dict[str, Any]:
        """The head's report as it comes up, before anything was asked of it."""
        first, *others = self._names
        up = ("up", self._model.name, *choice.options, *head_options(self._lab, first), "--json")
        devices = ("--device", "torch:cpu", "--threads", "1")
        pool = ("--wait-for", str(len(self._names)), "--concurrency", str(self._chats), "--context", str(self._context))
        head = self._command(stack, first, [*up, *devices, *pool])
        head.wait_for_file(self._lab.facts.folder / first / "run" / "head.json", _STARTS_WITHIN_S)
        for name in others:
            self._command(stack, name, ["join", *join_options(self._lab, name, self._pairing_address), *devices])
        return head.wait_for_facts(_UP_WITHIN_S)

    def _command(self, stack: ExitStack, host: str, arguments: Sequence[str]) -> CommandProcess:
        process = CommandProcess(arguments, partial(self._lab.popen, host))
        stack.callback(process.stop)
        return process

    def _measure(self) -> list[dict[str, Any]]:
        """One chat, then many."""
        # The chats that `up` plans for: the last one begins before the first one has ended, and a token has as much
        # context on average as a predicted one.
        chat = workload_of(profile_of(self._model), Settings(context=self._context, concurrency=self._chats))
        lengths = ("--prompt", str(chat.prompt_tokens), "--output", str(chat.output_tokens))
        grid = (*lengths, "--concurrency", "1", str(self._chats), "--rounds", "1")
        command = [sys.executable, "-P", "-m", "potluck.measure", *grid]
        done = self._lab.run(self._names[0], command, limited=False, timeout_s=_MEASURED_WITHIN_S)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
        return rows


def random_model(shape: LlamaShape, folder: Path) -> StoredModel:
    """A random checkpoint in the store, with the demo model's tokenizer."""
    if not (folder / "config.json").exists():
        write_checkpoint(shape, folder)
        tokenizer = Store(home_dir()).pull("smollm2").path
        for name in _TOKENIZER_FILES:
            (folder / name).write_bytes((tokenizer / name).read_bytes())
    return Store(home_dir()).pull(f"file:{folder}")


def _configure(lab: Lab, names: Sequence[str]) -> None:
    """Hosts that share a machine are measured in turn, and anew for each plan."""
    for name in names:
        file = lab.facts.folder / name / "config.toml"
        file.write_text("fresh = true\nmeasure_in_turn = true\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", type=Path, default=_LAB)
    parser.add_argument("--model", default="smollm2", help="a model of the store")
    parser.add_argument("--random-1b", type=Path, default=None, help="a random Llama-3.2-1B, written to this folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chats", type=int, default=8, help="chats at once that count as saturated")
    parser.add_argument("--context", type=int, default=1024, help="of each chat; prompt and answer get half at most")
    parser.add_argument("--plans", nargs="+", default=None, help="only the plans with these names")
    parser.add_argument("--json", type=Path, required=True, help="written after every visit")
    options = parser.parse_args()

    try:
        store = Store(home_dir())
        model = store.pull(options.model) if options.random_1b is None else random_model(LLAMA_1B, options.random_1b)
        spec = load_spec(options.lab)
        if len(spec.hosts) != 3:
            raise LabError(f"{options.lab} has {len(spec.hosts)} hosts", hint="this experiment is for three")
        with Lab(spec) as lab:
            _configure(lab, [host.name for host in spec.hosts])
            experiment = PredictionExperiment(lab, spec, model, chats=options.chats, context=options.context)
            choices = plan_choices(experiment.devices, model.spec.num_layers)
            choices = [choice for choice in choices if options.plans is None or choice.name in options.plans]
            about = {
                **hardware_facts(),
                "model": model.name,
                "chats": options.chats,
                "context_tokens": options.context,
                "lab": options.lab.read_text(),
            }
            visits: list[PlanTrial] = []
            for number in range(options.rounds):
                for choice in choices:
                    say(f"round {number + 1} of {options.rounds}: {choice.name}")
                    visits.append(experiment.run_trial(choice, number))
                    write_result({**about, **summary(visits)}, options.json, shown="")
    except PotluckError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(summary(visits)["medians"], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
