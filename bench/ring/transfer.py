"""Pieces of a model between hosts: three load at once from one, two that need the same, a cut, and the plain speed.

python -m bench.ring.transfer [--uplink 200mbit] [--stage-mib 96] [--rounds 3] [--only lab speed] [--json FILE]

lab: a head whose network card has that rate and three hosts, each with a namespace of its own; every stage's pieces are
random, of the sizes that tensors have. speed: one fetch over loopback, into memory and onto the disk, beside the link
measured through the server and beside a bare ROUTER and DEALER with CURVE, each end a process. The lab needs root.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from bench.lab import Lab, LabError, parse_spec
from bench.lab.spec import parse_rate
from bench.ring.transfer_child import LIST_FILE, MODEL_FILE
from bench.targets import Round, Target, ratio, run_rounds
from potluck.measure.child_process import ChildEnded, SystemUnderTest
from potluck.measure.result import hardware_facts, say, write_result
from transport.errors import PotluckError
from transport.messages.pieces import LIST_VERSION, MAX_PIECE_BYTES, ListedFile, PieceList, PlacedPiece
from transport.pieces.assignment import assign_pieces

_MODULE = "bench.ring.transfer_child"
_SMALL_BYTES = 4096
_NUM_SMALL = 20


class HostProcess(SystemUnderTest):
    """A host of the bench; `peer` is how others reach it: name, endpoint, key."""

    def __init__(self, stack: ExitStack, name: str, address: str, model: RandomModel, start: Any = None) -> None:
        arguments = [name, address, str(model.folder), model.digest]
        super().__init__(name, _MODULE, arguments, threads=1, start=start)
        stack.callback(self.kill)
        self.peer: list[str] = self.ready["peer"]

    @property
    def key(self) -> str:
        return self.peer[2]


class RandomModel:
    """Random stages in one file, with its list."""

    def __init__(self, folder: Path, stage_bytes: Sequence[int]) -> None:
        self.folder = folder
        self.sizes: list[int] = []
        self.stages: list[list[int]] = []
        placed: list[PlacedPiece] = []
        offset = 0
        with (folder / MODEL_FILE).open("wb") as file:
            for number, num_bytes in enumerate(stage_bytes):
                sizes = _piece_sizes(num_bytes)
                self.stages.append(list(range(len(placed), len(placed) + len(sizes))))
                for size in sizes:
                    data = os.urandom(size)
                    file.write(data)
                    placed.append(PlacedPiece(offset, size, hashlib.sha256(data).hexdigest(), f"stage {number}"))
                    offset += size
                self.sizes += sizes
        listed = ListedFile(name=MODEL_FILE, num_bytes=offset, pieces=tuple(placed))
        content = msgspec.json.encode(
            PieceList(version=LIST_VERSION, model="random", format="safetensors", files=(listed,))
        )
        (folder / LIST_FILE).write_bytes(content)
        self.digest = hashlib.sha256(content).hexdigest()

    def num_bytes(self, numbers: Sequence[int]) -> int:
        return sum(self.sizes[number] for number in numbers)


def _piece_sizes(num_bytes: int) -> list[int]:
    """Small tensors, and large ones in pieces."""
    rest = num_bytes - _NUM_SMALL * _SMALL_BYTES
    large = [MAX_PIECE_BYTES] * (rest // MAX_PIECE_BYTES)
    return [_SMALL_BYTES] * _NUM_SMALL + large + ([rest % MAX_PIECE_BYTES] if rest % MAX_PIECE_BYTES else [])


SECTIONS = ("lab", "speed")
_HOSTS = ("one", "two", "three")
_SPEED_BYTES = 64 * MAX_PIECE_BYTES
_MEMORY = Path("/dev/shm")
_NEVER = 2.0
_CUTS = (0.3, 0.7)

TARGETS = (
    Target(
        name="three at once over max(all bytes / uplink, slowest alone)",
        limit=1.25,
        sense="at most",
        value=ratio("at once s", "at least s"),
    ),
    Target(
        name="sent to a host over its own bytes",
        limit=1.01,
        sense="at most",
        value=lambda found: found.get("sent ratio"),
    ),
    Target(name="sent twice after two kills", limit=1.01, sense="at most", value=lambda found: found.get("cut ratio")),
    Target(name="bytes of a second run", limit=0, sense="at most", value=lambda found: found.get("second run bytes")),
    Target(
        name="received by its network card over its own bytes",
        limit=None,
        sense="at most",
        value=lambda found: found.get("card ratio"),
    ),
    Target(
        name="two that need the same: what the head sends over once",
        limit=1.01,
        sense="at most",
        value=lambda found: found.get("shared head ratio"),
    ),
    Target(
        name="two that need the same: time over that without hints",
        limit=None,
        sense="at most",
        value=ratio("shared s", "shared without hints s"),
    ),
    Target(
        name="fetch into memory over bare CURVE", limit=0.8, sense="at least", value=ratio("fetch MB/s", "bare MB/s")
    ),
    Target(name="server over bare CURVE", limit=0.8, sense="at least", value=ratio("server MB/s", "bare MB/s")),
)


class TransferBench:
    """One lab with its hosts; every fetch is into a new store unless it says which."""

    def __init__(self, stack: ExitStack, lab: Lab, model: RandomModel, stores: Path) -> None:
        self.model = model
        self._stack = stack
        self._lab = lab
        self._stores = stores
        self._count = 0
        self.head = self._host("head")
        self.hosts = [self._host(name) for name in _HOSTS]
        self.introduce()

    def introduce(self) -> None:
        everybody = [self.head, *self.hosts]
        for host in everybody:
            host.call("members", keys=[other.key for other in everybody])

    def restart(self, number: int) -> None:
        """Kill it, and start it anew."""
        self.hosts[number].kill()
        self.hosts[number] = self._host(_HOSTS[number])
        self.introduce()

    def new_store(self) -> str:
        self._count += 1
        return str(self._stores / str(self._count))

    def start_fetch(self, number: int, numbers: Sequence[int], **options: Any) -> None:
        told = {"store": self.new_store(), "peers": [self.head.peer], "hints": [], "hold_at": _NEVER, **options}
        self.hosts[number].send("get", numbers=list(numbers), **told)

    def sent_to(self) -> dict[str, int]:
        """By the head, by key."""
        counts: dict[str, int] = self.head.call("sent")["bytes"]
        return counts

    def sent(self) -> int:
        return sum(self.sent_to().values())

    def _host(self, name: str) -> HostProcess:
        return HostProcess(self._stack, name, self._lab.address(name), self.model, partial(self._lab.popen, name))


def lab_round(bench: TransferBench, uplink_bytes_per_s: float) -> Round:
    return load_round(bench, uplink_bytes_per_s) | shared_round(bench) | cut_round(bench)


def load_round(bench: TransferBench, uplink_bytes_per_s: float) -> Round:
    """Each stage alone, all at once, and once more."""
    model, found = bench.model, Round()
    stores = [bench.new_store() for _ in _HOSTS]
    all_bytes = sum(model.sizes)
    for number, stage in enumerate(model.stages):
        bench.start_fetch(number, stage)
        found[f"stage {number} alone s"] = bench.hosts[number].read_reply()["seconds"]
    counts = bench.sent_to()
    for number, stage in enumerate(model.stages):
        bench.start_fetch(number, stage, store=stores[number])
    answers = [host.read_reply() for host in bench.hosts]
    found["at once s"] = max(answer["seconds"] for answer in answers)
    found["uplink s"] = all_bytes / uplink_bytes_per_s
    found["at least s"] = max(found["uplink s"], *(found[f"stage {number} alone s"] for number in range(3)))
    own = [model.num_bytes(stage) for stage in model.stages]
    after, keys = bench.sent_to(), [host.key for host in bench.hosts]
    found["sent ratio"] = max((after[key] - counts[key]) / count for key, count in zip(keys, own, strict=True))
    found["card ratio"] = max(answer["card_bytes"] / count for answer, count in zip(answers, own, strict=True))
    before = bench.sent()
    for number, stage in enumerate(model.stages):
        bench.start_fetch(number, stage, store=stores[number])
        bench.hosts[number].read_reply()
    found["second run bytes"] = bench.sent() - before
    return found


def shared_round(bench: TransferBench) -> Round:
    """Hosts one and two need the same: with hints, and all from the head."""
    model, found = bench.model, Round()
    numbers = model.stages[0] + model.stages[1]
    pair = bench.hosts[:2]
    hints = assign_pieces({host.key: numbers for host in pair}, model.sizes)
    before = bench.sent()
    for number, (host, other) in enumerate(zip(pair, pair[::-1], strict=True)):
        given = [[hint.peer, hint.first, hint.last] for hint in hints[host.key]]
        bench.start_fetch(number, numbers, peers=[other.peer, bench.head.peer], hints=given)
    answers = [host.read_reply() for host in pair]
    found["shared s"] = max(answer["seconds"] for answer in answers)
    found["shared head ratio"] = (bench.sent() - before) / model.num_bytes(numbers)
    for host, answer in zip(pair, answers, strict=True):
        for name, count in answer["bytes_by_peer"].items():
            found[f"shared: to {host.name} from {name} MB"] = count / 1e6
    for number in range(2):
        bench.start_fetch(number, numbers)
    found["shared without hints s"] = max(host.read_reply()["seconds"] for host in pair)
    return found


def cut_round(bench: TransferBench) -> Round:
    """Host three is killed twice on its way; the head counts what it sent."""
    model, store = bench.model, bench.new_store()
    numbers = [number for stage in model.stages for number in stage]
    before = bench.sent()
    for hold_at in _CUTS:
        bench.start_fetch(2, numbers, store=store, hold_at=hold_at)
        bench.hosts[2].read_reply()
        bench.restart(2)
    bench.start_fetch(2, numbers, store=store)
    bench.hosts[2].read_reply()
    return {"cut ratio": (bench.sent() - before) / sum(model.sizes)}


def speed_round(giver: HostProcess, taker: HostProcess, model: RandomModel, store: Path) -> Round:
    """Everything in turns: other programs use the machine too."""
    given = giver.call("bare_give", key=taker.key, num_bytes=_SPEED_BYTES)
    bare = taker.call("bare_take", endpoint=given["endpoint"], key=giver.key, num_bytes=_SPEED_BYTES)
    server = taker.call("speed", peer=giver.peer, num_bytes=64 * 2**20)
    numbers = model.stages[0]
    told = {"peers": [giver.peer], "hints": [], "hold_at": _NEVER}
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as memory:
        fetched = taker.call("get", numbers=numbers, store=memory, **told)
    to_disk = taker.call("get", numbers=numbers, store=str(store), **told)
    return {
        "bare MB/s": bare["bytes_per_s"] / 1e6,
        "server MB/s": server["bytes_per_s"] / 1e6,
        "fetch MB/s": model.num_bytes(numbers) / fetched["seconds"] / 1e6,
        "fetch to disk MB/s": model.num_bytes(numbers) / to_disk["seconds"] / 1e6,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uplink", default="200mbit", help="the rate of the head's network card")
    parser.add_argument("--stage-mib", type=int, default=96, help="bytes of a stage")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION")
    parser.add_argument("--json", type=Path, default=None, help="also write the result to this file")
    options = parser.parse_args()
    result: dict[str, Any] = {**hardware_facts(), "uplink": options.uplink, "stage_bytes": options.stage_mib * 2**20}
    try:
        with tempfile.TemporaryDirectory() as folder:
            if "lab" in options.only:
                result["lab"] = _lab(Path(folder), options.uplink, options.stage_mib * 2**20, options.rounds)
            if "speed" in options.only:
                result["speed"] = _speed(Path(folder), options.rounds)
    except (PotluckError, LabError, ChildEnded) as error:
        say(f"error: {error}")
        return 1
    write_result(result, options.json)
    return 0


def _lab(folder: Path, uplink: str, stage_bytes: int, rounds: int) -> dict[str, Any]:
    hosts = [{"name": "head", "rate": uplink}, *({"name": name} for name in _HOSTS)]
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(parse_spec({"hosts": hosts}), store=folder))
        (folder / "lab").mkdir()
        bench = TransferBench(stack, lab, RandomModel(folder / "lab", [stage_bytes] * len(_HOSTS)), folder / "stores")
        return run_rounds(lambda number: lab_round(bench, parse_rate(uplink) / 8), rounds, "lab", TARGETS)


def _speed(folder: Path, rounds: int) -> dict[str, Any]:
    (folder / "speed").mkdir()
    model = RandomModel(folder / "speed", [_SPEED_BYTES])
    with ExitStack() as stack:
        giver, taker = (HostProcess(stack, name, "127.0.0.1", model) for name in ("head", "one"))
        for host in (giver, taker):
            host.call("members", keys=[giver.key, taker.key])
        return run_rounds(
            lambda number: speed_round(giver, taker, model, folder / f"got-{number}"), rounds, "speed", TARGETS
        )


if __name__ == "__main__":
    sys.exit(main())
