"""Schedules over emulated hosts: a filled ring with and without delay between its hosts, a prompt over three stages.

python -m bench.ring.lab_scheduling [--model smollm2] [--rounds 5] [--only filled prefill] [--json FILE]

filled: two stages of half a core, 10 ms on every hop or none, both labs up at once and measured in turns; both have
4·B* chats, B* being what fills the ring with the delay. prefill: 2,048 tokens over three stages of half a core, in the
engine's chunks and in one step. Engines and whoever measures are on a host of their own, without limits. Needs root.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.lab import Lab, join_options, load_spec, pair_hosts
from bench.targets import LAB_TARGETS, Round, judge_targets, medians_present, rounded
from potluck.measure.child_process import ROOT, SystemUnderTest
from potluck.measure.head_process import CommandProcess
from potluck.measure.result import hardware_facts
from potluck.store.store import Store
from potluck.system.paths import home_dir
from transport.errors import PotluckError

SECTIONS = ("filled", "prefill")
_LABS = Path(__file__).parents[1] / "lab" / "specs"
_PORTS = (11511, 11521)
_MODULE = "bench.ring.lab_scheduling_child"


class LabRings(SystemUnderTest):
    """The rings of one lab: its first host has the engine, the others a stage each."""

    def __init__(self, stack: ExitStack, lab: Lab, model: str, layers: str | None) -> None:
        """Starts everything; `wait` until it is ready."""
        desk, *others = lab.facts.hosts
        address = lab.address(desk)
        pair_hosts(lab, desk, others, port=_PORTS[0])
        by_hand = ("--layers", layers) if layers else ()
        arguments = ("--model", model, "--name", desk, "--address", address, "--stages", str(len(others)), *by_hand)
        self.name = "a lab's rings"
        self._process = lab.popen(
            desk,
            [sys.executable, "-P", "-m", _MODULE, *arguments, "--ports", *map(str, _PORTS)],
            limited=False,
            environment={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.pid = self._process.pid
        stack.callback(self.close)
        self._read()
        for host in others:
            for port in _PORTS:
                self._join(stack, lab, host, f"{address}:{port}")

    def wait(self) -> list[Any]:
        """The stages: device and number of layers. Raises RuntimeError."""
        self.ready = self._read()
        stages: list[Any] = self.ready["stages"]
        return stages

    def _join(self, stack: ExitStack, lab: Lab, host: str, head: str) -> None:
        def popen(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
            return lab.popen(host, command, **options)

        device = ("--device", "torch:cpu", "--threads", "1")
        process = CommandProcess(["join", *join_options(lab, host, head), *device], popen)
        stack.callback(process.stop)


@contextmanager
def lab_rings(file: Path, model: str, layers: str | None) -> Iterator[LabRings]:
    """A lab with its rings, when they are ready. Raises PotluckError, RuntimeError."""
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(load_spec(file)))
        rings = LabRings(stack, lab, model, layers)
        rings.wait()
        yield rings


def filled(near: LabRings, far: LabRings, number: int) -> Round:
    """As many chats as fill the ring with the delay four times, with and without it."""
    alone = far.call("alone")
    count = 4 * alone["groups"]
    values: Round = {"hops with delay s": alone["hops_s"], "streams": count}
    values |= {f"stage {index} s": seconds for index, seconds in enumerate(alone["stage_s"])}
    turns = [("without delay", near), ("with delay", far)]
    for name, rings in turns if number % 2 == 0 else turns[::-1]:
        found = rings.call("filled", count=count)
        values[f"filled {name}"] = found["tokens_per_s"]
        values[f"rows {name}"] = found["rows"]
        values[f"filled bound {name}"] = found["rows"] / max(found["stage_s"])
    return values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a model of the store")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    parser.add_argument("--layers-two", default=None, help='by hand, "one/cpu=18,two/cpu=12"; default: the planner\'s')
    parser.add_argument("--layers-three", default=None, help="the same for the three stages of a prompt")
    parser.add_argument("--json", type=Path, default=None, help="also write the result to this file")
    options = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    result: dict[str, Any] = {**hardware_facts(), "model": options.model, "rounds": options.rounds}
    try:
        Store(home_dir()).pull(options.model, lambda _: None)
        if "filled" in options.only:
            result["filled"] = _filled(options.model, options.layers_two, options.rounds, say)
        if "prefill" in options.only:
            result["prefill"] = _prefill(options.model, options.layers_three, options.rounds, say)
    except (PotluckError, RuntimeError, subprocess.SubprocessError) as error:
        say(f"error: {error}")
        return 1
    print(json.dumps(result, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _filled(model: str, layers: str | None, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    say("filled: starting two labs")
    with ExitStack() as stack:
        near = stack.enter_context(lab_rings(_LABS / "two-stages.toml", model, layers))
        stages = near.ready["stages"]
        # The same cut in both.
        same = ",".join(f"{device}={count}" for device, count in stages)
        far = stack.enter_context(lab_rings(_LABS / "two-stages-delay.toml", model, same))
        for rings in (near, far):
            rings.call("filled", count=4)  # warm
        return _report(stages, lambda number: filled(near, far, number), "filled", rounds, say)


def _prefill(model: str, layers: str | None, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    say("prefill: starting a lab")
    with lab_rings(_LABS / "three-stages.toml", model, layers) as rings:
        rings.call("prefill", number=0)  # warm
        stages = rings.ready["stages"]
        return _report(stages, lambda number: rings.call("prefill", number=number), "prefill", rounds, say)


def _report(
    stages: list[Any], measure: Callable[[int], Round], name: str, rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    found: list[Round] = []
    for number in range(rounds):
        say(f"{name}: round {number + 1} of {rounds}")
        found.append(measure(number))
    return {
        "stages": stages,
        "targets": judge_targets(found, LAB_TARGETS),
        "medians": rounded(medians_present(found)),
        "values": [rounded(values) for values in found],
    }


if __name__ == "__main__":
    sys.exit(main())
