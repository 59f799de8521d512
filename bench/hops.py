"""What does one hop between neighbours cost? Potluck's links beside ZeroMQ alone, and the hop of a real ring.

potluck bench --hops [--rounds 6] [--trips 50] [--pause-ms 3] [--model smollm2 | --no-ring] [--json FILE]
Two processes of this machine send one message back and forth. Before each, the sender keeps a core busy like a stage
that reads its weights, while the other one sleeps: that is how messages come in a ring, and it is what costs. A hop is
from a stage's result to the checked message in the other process. "ZeroMQ" sends the same bytes without making or
looking at them; over TCP with encryption, which Potluck always has there, and without. Everything takes turns, round
after round, because machines drift.

A ring's hop is (a step's round trip - the stages' compute) / (stages + 1), over decode steps of one chat.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from bench.contestant import Contestant
from bench.hardware import facts
from bench.hop_ends import CARRIERS, WAYS, Carrier, Way
from bench.hops_report import HopRow, Seconds, table
from potluck.paths import home_dir
from potluck.store import Store
from transport.errors import PotluckError

HIDDEN_SIZE = 576
NUM_STAGES = 2
_RING_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """A step of `entries` with `tokens` each."""

    name: str
    entries: int
    tokens: int


STEPS = (
    StepShape(name="decode, 1 chat", entries=1, tokens=1),
    StepShape(name="decode, 8 chats", entries=8, tokens=1),
    StepShape(name="prefill, 512 tokens", entries=1, tokens=512),
)


def measure_links(*, rounds: int, trips: int, pause_s: float) -> list[HopRow]:
    """Raises RuntimeError if a child ends before it is done."""
    links = [(step, carrier, way) for step, carrier in product(STEPS, CARRIERS) for way in WAYS[carrier]]
    hops: dict[str, list[float]] = {_name(*link): [] for link in links}
    parts: dict[str, dict[str, list[float]]] = {step.name: {"encode": [], "decode": []} for step in STEPS}
    with ExitStack() as stack:
        run_dir = tempfile.mkdtemp(prefix="plh-")
        stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        ends = []
        for name in ("a", "b"):
            Path(run_dir, name).mkdir()
            child = Contestant(f"end {name}", "bench.hops_child", [f"{run_dir}/{name}"], threads=1)
            ends.append(stack.enter_context(child))
        both = stack.enter_context(ThreadPoolExecutor(2))
        for step in STEPS:
            for end in ends:
                end.ask("step", name=step.name, entries=step.entries, tokens=step.tokens, hidden_size=HIDDEN_SIZE)
        for link in links:
            _connect(ends, *link)
        for number in range(rounds):
            _say(f"links, round {number + 1} of {rounds}")
            for link in links:
                hops[_name(*link)] += _exchange(both, ends, _name(*link), trips, pause_s)
            for step in STEPS:
                found = ends[0].ask("codec", step=step.name, times=trips, pause_s=pause_s)
                for part, seconds in found.items():
                    parts[step.name][part] += seconds
        for end in ends:
            end.ask("close")
    return [
        HopRow(
            step=step.name,
            carrier=carrier,
            raw=Seconds.of(hops[_name(step, carrier, "raw")]),
            potluck=Seconds.of(hops[_name(step, carrier, "potluck")]) if "potluck" in WAYS[carrier] else None,
            encode=Seconds.of(parts[step.name]["encode"]),
            decode=Seconds.of(parts[step.name]["decode"]),
        )
        for step, carrier in product(STEPS, CARRIERS)
    ]


def _name(step: StepShape, carrier: Carrier, way: Way) -> str:
    return f"{way} over {carrier}: {step.name}"


def _connect(ends: Sequence[Contestant], step: StepShape, carrier: Carrier, way: Way) -> None:
    link = _name(step, carrier, way)
    publics = [end.ready["public"] for end in ends]
    endpoints = [
        end.ask("listen", link=link, way=way, carrier=carrier, step=step.name, other=other)["endpoint"]
        for end, other in zip(ends, reversed(publics), strict=True)
    ]
    for end, endpoint in zip(ends, reversed(endpoints), strict=True):
        end.ask("connect", link=link, endpoint=endpoint)


def _exchange(
    both: ThreadPoolExecutor, ends: Sequence[Contestant], link: str, trips: int, pause_s: float
) -> list[float]:
    """Seconds of each hop, both ways."""

    def ask(end: Contestant) -> dict[str, list[float]]:
        return end.ask("exchange", link=link, leads=end is ends[0], trips=trips, pause_s=pause_s)

    there, back = both.map(ask, ends)
    pairs = (there["sent"], back["came"]), (back["sent"], there["came"])
    return [came - sent for all_sent, all_came in pairs for sent, came in zip(all_sent, all_came, strict=True)]


def measure_ring(model: str, *, rounds: int) -> dict[str, Any]:
    """The hop of a ring of two stages that serves one chat. Raises PotluckError."""
    from bench.rings import PROMPT, split_ring  # loads torch, which links alone do not need

    path = Store(home_dir()).pull(model, lambda _: None).path
    _say(f"a ring of {NUM_STAGES} stages with {model}")
    with split_ring(path, "bfloat16", NUM_STAGES) as ring:
        ring.run(PROMPT, _RING_TOKENS)  # warm
        found = [ring.run(PROMPT, _RING_TOKENS) for _ in range(rounds)]
    hops = Seconds.of([seconds for run in found for seconds in run.hops_s])
    return {"model": model, "stages": NUM_STAGES, **asdict(hops)}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="potluck bench --hops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--trips", type=int, default=50, help="messages each way in a round")
    parser.add_argument("--pause-ms", type=float, default=3.0, help="computing before each message")
    parser.add_argument("--model", default="smollm2", help="a model of the store, for the ring")
    parser.add_argument("--no-ring", action="store_true", help="links only")
    parser.add_argument("--json", type=Path, default=None, help="also write the result to this file")
    options = parser.parse_args(list(arguments))
    if options.rounds < 1 or options.trips < 2 or not 0 <= options.pause_ms <= 1000:
        parser.error("--rounds, --trips or --pause-ms is out of range")
    try:
        rows = measure_links(rounds=options.rounds, trips=options.trips, pause_s=options.pause_ms / 1e3)
        ring = None if options.no_ring else measure_ring(options.model, rounds=options.rounds)
    except (PotluckError, RuntimeError) as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    print(table(rows, ring, options.pause_ms))
    if options.json is not None:
        result = {**facts(), "pause_ms": options.pause_ms, "hidden_size": HIDDEN_SIZE}
        result |= {"rounds": options.rounds, "trips": options.trips, "links": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps({**result, "ring": ring}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
