"""A filled ring over emulated hosts, with 10 ms on every hop between them and without.

python -m bench.ring.lab_scheduling [--model smollm2] [--rounds 5] [--layers one/cpu=18,two/cpu=12] [--json FILE]

Two stages of half a core; both labs are up at once and measured in turns, with 4·B* chats each, B* being what fills the
ring with the delay. Engines and the measuring process are on a host of their own, without limits. Needs root.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.lab import Lab, join_options, load_spec, pair_hosts
from bench.ring.driven_ring import driven_ring
from bench.ring.engine_ring import engine_ring, pool_of_hosts
from bench.ring.sections import Prompts, drive, run_steadily, sum_of_hops_s
from bench.targets import LAB_TARGETS, Round, alternated, filled_ring, run_rounds
from devices.pairing.identity import load_keys
from potluck.engine.tokenizer import Tokenizer
from potluck.host.local_host import ThisHost
from potluck.measure.child_process import SystemUnderTest, reply_pipe, send_reply, serve_commands
from potluck.measure.head_process import CommandProcess
from potluck.measure.result import hardware_facts, say, write_result
from potluck.store.store import Store
from potluck.system.paths import home_dir, identity_dir
from potluck.system.settings import Settings
from transport.errors import PotluckError

_LABS = Path(__file__).parents[1] / "lab" / "specs"
_PORTS = (11511, 11521)
"""Of the pairing servers of the engine's pool and of the driven one's."""
_CHILD = "--child"
# KV for about 60 chats of them.
_STEADY_S, _STEADY_TOKENS = 8.0, 400
_CONTEXT_TOKENS, _CONCURRENCY = 4096, 8
_MAX_STEP_TOKENS = 2048


class LabRings(SystemUnderTest):
    """The rings of one lab: its first host has the engine, the others a stage each. `stages` are (device, layers)."""

    def __init__(self, stack: ExitStack, lab: Lab, model: str, layers: str) -> None:
        """Raises PotluckError, RuntimeError."""
        desk, *others = lab.facts.hosts
        address = lab.address(desk)
        pair_hosts(lab, desk, others, port=_PORTS[0])
        arguments = [_CHILD, model, desk, address, str(len(others)), layers]
        start = partial(lab.popen, desk, limited=False)
        super().__init__("a lab's rings", "bench.ring.lab_scheduling", arguments, threads=1, start=start)
        stack.callback(self.close)
        for host in others:
            for port in _PORTS:
                join = ("join", *join_options(lab, host, f"{address}:{port}"), "--device", "torch:cpu")
                process = CommandProcess([*join, "--threads", "1"], partial(lab.popen, host))
                stack.callback(process.stop)
        self.stages: list[Any] = self.read_reply()["stages"]


@contextmanager
def lab_rings(file: Path, model: str, layers: str) -> Iterator[LabRings]:
    """A lab with its rings, when they are ready. Raises PotluckError, RuntimeError."""
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(load_spec(file)))
        yield LabRings(stack, lab, model, layers)


def filled(near: LabRings, far: LabRings, number: int) -> Round:
    """As many chats as fill the ring with the delay four times, with and without it."""
    alone = far.call("alone")
    count = 4 * alone["groups"]
    values: Round = {"hops with delay s": alone["hops_s"], "streams": count}
    values |= {f"stage {index} s": seconds for index, seconds in enumerate(alone["stage_s"])}
    for name, rings in alternated([("without delay", near), ("with delay", far)], number):
        found = rings.call("filled", count=count)
        values[f"filled {name}"] = found["tokens_per_s"]
        values[f"rows {name}"] = found["rows"]
        values[f"filled bound {name}"] = found["rows"] / max(found["stage_s"])
    return values


def serve_rings(model_name: str, name: str, address: str, num_stages: str, layers: str) -> None:
    """The child, on the engine's host: it replies when it listens, again when its rings are ready, and takes commands.
    `layers` as `potluck up` takes them; "" for the planner's."""
    replies = reply_pipe()
    here = ThisHost(name=name, address=address, keys=load_keys(identity_dir()))
    model = Store(home_dir()).resolve(model_name)
    prompts = Prompts(Tokenizer(model.path), model.spec.vocab_size)
    settings = Settings(
        context=_CONTEXT_TOKENS,
        concurrency=_CONCURRENCY,
        use_all=True,
        objective="throughput",
        layers=layers or None,
    )
    with ExitStack() as stack:
        pool, driven_pool = (stack.enter_context(pool_of_hosts(here, port)) for port in _PORTS)
        send_reply(replies, {"listening": _PORTS})
        for each in (pool, driven_pool):
            each.wait_for(int(num_stages))
        # Hosts that share a machine are measured in turn.
        plan = pool.plan(model, settings, in_turn=True)
        ring = stack.enter_context(engine_ring("ring", pool, model, plan, prompts.eos_ids))
        driven = stack.enter_context(driven_ring(driven_pool, model, plan, max_step_tokens=_MAX_STEP_TOKENS))

        def alone() -> dict[str, Any]:
            """One row that goes round alone: what stages take, what hops do, and so how many groups fill the ring."""
            found = drive(driven, prompts, 1, 1)
            hops_s = sum_of_hops_s(found)
            return {"stage_s": found.stage_s, "hops_s": hops_s, "groups": filled_ring(found.stage_s, hops_s)}

        def filled(count: int) -> dict[str, Any]:
            rate, steps = run_steadily(ring, prompts, count, seconds=_STEADY_S, most_tokens=_STEADY_TOKENS)
            return {"tokens_per_s": rate, "rows": steps[0].rows, "stage_s": [step.seconds for step in steps]}

        stages = [[stage.device, stage.num_layers] for stage in plan.stages]
        serve_commands({"alone": alone, "filled": filled}, {"stages": stages}, replies)


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == [_CHILD]:
        serve_rings(*arguments[1:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a model of the store")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", default="", help='by hand, "one/cpu=18,two/cpu=12"; default: the planner\'s')
    parser.add_argument("--json", type=Path, default=None, help="also write the result to this file")
    options = parser.parse_args(arguments)
    try:
        Store(home_dir()).pull(options.model, lambda _: None)
        say("starting two labs")
        with ExitStack() as stack:
            near = stack.enter_context(lab_rings(_LABS / "two-stages.toml", options.model, options.layers))
            # The same cut in both.
            same = ",".join(f"{device}={count}" for device, count in near.stages)
            far = stack.enter_context(lab_rings(_LABS / "two-stages-delay.toml", options.model, same))
            for rings in (near, far):
                rings.call("filled", count=4)  # warm
            found = run_rounds(lambda number: filled(near, far, number), options.rounds, "filled", LAB_TARGETS)
            result = {**hardware_facts(), "model": options.model, "stages": near.stages, **found}
    except (PotluckError, RuntimeError, subprocess.SubprocessError) as error:
        say(f"error: {error}")
        return 1
    write_result(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
