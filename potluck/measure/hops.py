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
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Self

from potluck.measure.child_process import SystemUnderTest
from potluck.measure.hop_process import CARRIERS, LINK_KINDS, Carrier, LinkKind
from potluck.measure.result import hardware_facts, say, write_result
from potluck.store.store import Store
from potluck.system.paths import home_dir
from transport.errors import PotluckError

_CARRIERS: dict[Carrier, str] = {"ipc": "ipc", "tcp": "TCP loopback", "curve": "TCP with CURVE"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HopSeconds:
    """Of many times the same."""

    p50_s: float
    p95_s: float

    @classmethod
    def of(cls, found: Sequence[float]) -> Self:
        return cls(p50_s=statistics.median(found), p95_s=statistics.quantiles(found, n=20, method="inclusive")[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class HopRow:
    """One message over one carrier. `encode` and `decode` are parts of `potluck`, measured apart after such pauses;
    `potluck` is None over TCP without encryption, where Potluck never sends."""

    step: str
    carrier: Carrier
    raw: HopSeconds
    potluck: HopSeconds | None
    encode: HopSeconds
    decode: HopSeconds


def table(rows: Sequence[HopRow], ring: dict[str, Any] | None, pause_ms: float) -> str:
    """Microseconds, a line a row; "rest" is what Potluck's hop has beside its two parts."""
    lines = [
        f"A hop on this machine, {pause_ms:g} ms of computing before each message; p50 and p95 in µs",
        "",
        f"{'message':<20} {'carrier':<15} {'ZeroMQ alone':>14} {'Potluck':>14}   "
        f"{'encode':>7} {'decode+check':>13} {'rest':>6}",
    ]
    for row in rows:
        start = f"{row.step:<20} {_CARRIERS[row.carrier]:<15} {_both(row.raw):>14}"
        if row.potluck is None:
            lines.append(f"{start} {'–':>14}")
            continue
        rest_s = row.potluck.p50_s - row.encode.p50_s - row.decode.p50_s
        lines.append(
            f"{start} {_both(row.potluck):>14}   "
            f"{row.encode.p50_s * 1e6:>7.0f} {row.decode.p50_s * 1e6:>13.0f} {rest_s * 1e6:>6.0f}"
        )
    if ring is not None:
        hop = HopSeconds(p50_s=ring["p50_s"], p95_s=ring["p95_s"])
        lines += ["", f"A ring of {ring['stages']} stages of {ring['model']}, one chat, over ipc: {_both(hop)} a hop"]
    return "\n".join(lines)


def _both(seconds: HopSeconds) -> str:
    return f"{seconds.p50_s * 1e6:.0f} / {seconds.p95_s * 1e6:.0f}"


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
    links = [(step, carrier, way) for step, carrier in product(STEPS, CARRIERS) for way in LINK_KINDS[carrier]]
    hops: dict[str, list[float]] = {_name(*link): [] for link in links}
    parts: dict[str, dict[str, list[float]]] = {step.name: {"encode": [], "decode": []} for step in STEPS}
    with ExitStack() as stack:
        run_dir = tempfile.mkdtemp(prefix="plh-")
        stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        ends = []
        for name in ("a", "b"):
            Path(run_dir, name).mkdir()
            child = SystemUnderTest(f"end {name}", "potluck.measure.hop_process", [f"{run_dir}/{name}"], threads=1)
            ends.append(stack.enter_context(child))
        both = stack.enter_context(ThreadPoolExecutor(2))
        for step in STEPS:
            for end in ends:
                end.call("step", name=step.name, entries=step.entries, tokens=step.tokens, hidden_size=HIDDEN_SIZE)
        for link in links:
            _connect(ends, *link)
        for number in range(rounds):
            say(f"links, round {number + 1} of {rounds}")
            for link in links:
                hops[_name(*link)] += _exchange(both, ends, _name(*link), trips, pause_s)
            for step in STEPS:
                found = ends[0].call("codec", step=step.name, times=trips, pause_s=pause_s)
                for part, seconds in found.items():
                    parts[step.name][part] += seconds
        for end in ends:
            end.call("close")
    return [
        HopRow(
            step=step.name,
            carrier=carrier,
            raw=HopSeconds.of(hops[_name(step, carrier, "raw")]),
            potluck=HopSeconds.of(hops[_name(step, carrier, "potluck")]) if "potluck" in LINK_KINDS[carrier] else None,
            encode=HopSeconds.of(parts[step.name]["encode"]),
            decode=HopSeconds.of(parts[step.name]["decode"]),
        )
        for step, carrier in product(STEPS, CARRIERS)
    ]


def _name(step: StepShape, carrier: Carrier, way: LinkKind) -> str:
    return f"{way} over {carrier}: {step.name}"


def _connect(ends: Sequence[SystemUnderTest], step: StepShape, carrier: Carrier, way: LinkKind) -> None:
    link = _name(step, carrier, way)
    publics = [end.ready["public"] for end in ends]
    endpoints = [
        end.call("listen", link=link, way=way, carrier=carrier, step=step.name, other=other)["endpoint"]
        for end, other in zip(ends, reversed(publics), strict=True)
    ]
    for end, endpoint in zip(ends, reversed(endpoints), strict=True):
        end.call("connect", link=link, endpoint=endpoint)


def _exchange(
    both: ThreadPoolExecutor, ends: Sequence[SystemUnderTest], link: str, trips: int, pause_s: float
) -> list[float]:
    """Seconds of each hop, both ways."""

    def measure(end: SystemUnderTest) -> dict[str, list[float]]:
        return end.call("exchange", link=link, leads=end is ends[0], trips=trips, pause_s=pause_s)

    there, back = both.map(measure, ends)
    pairs = (there["sent"], back["came"]), (back["sent"], there["came"])
    return [came - sent for all_sent, all_came in pairs for sent, came in zip(all_sent, all_came, strict=True)]


def measure_ring(model: str, *, rounds: int) -> dict[str, Any]:
    """The hop of a ring of two stages that serves one chat. Raises PotluckError."""
    from potluck.measure.ring import PROMPT, split_ring  # loads torch, which links alone do not need

    path = Store(home_dir()).pull(model, lambda _: None).path
    say(f"a ring of {NUM_STAGES} stages with {model}")
    with split_ring(path, "bfloat16", NUM_STAGES) as ring:
        ring.run(PROMPT, _RING_TOKENS)  # warm
        found = [ring.run(PROMPT, _RING_TOKENS) for _ in range(rounds)]
    hops = HopSeconds.of([seconds for run in found for seconds in run.hops_s])
    return {"model": model, "stages": NUM_STAGES, **asdict(hops)}


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
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    result = {**hardware_facts(), "pause_ms": options.pause_ms, "hidden_size": HIDDEN_SIZE}
    result |= {"rounds": options.rounds, "trips": options.trips, "links": [asdict(row) for row in rows], "ring": ring}
    write_result(result, options.json, shown=table(rows, ring, options.pause_ms) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
