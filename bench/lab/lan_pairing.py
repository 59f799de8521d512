"""Do three hosts become one pool as the README says? Paired by invite and by code, with the model on one of them.

python -m bench.lab.lan_pairing [--model smollm2] [--rate 200mbit] [--only SECTION …] --json FILE

Three emulated hosts whose network cards have that rate, each with a namespace, an address and a POTLUCK_HOME of its
own. The model lies on the head's; one host pairs by invite, one by code and multicast DNS. Measured: the first start,
what each host was sent beside the bytes of its own tensors (by what hosts report, and by the counters of their cards,
where headers count), and a second start. alone: each host's stage while the other one has its own already. moved: hosts
get other addresses while the ring is up, and must come back by themselves. ports: the same pool without ipc, as on
Windows, where processes of a host talk over loopback ports with CURVE. revoked: how long a host that is put out still
serves, and that the others serve again without it. Needs root.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.lab.lab import Lab, home_of
from bench.lab.spec import HostSpec, LabSpec, parse_rate
from bench.targets import Round, Target, judge_targets, ratio
from potluck.measure.head_process import CLI, CommandProcess
from potluck.measure.result import hardware_facts, say
from potluck.store.manifest import StoredModel
from potluck.store.store import Store
from potluck.system.paths import home_dir
from shard.pieces.open import open_checkpoint
from transport.errors import PotluckError

_SHOWN_WITHIN_S = 60.0
_ASKED_WITHIN_S = 120.0
_LOOK_S = 0.02
_DEVICE = ("--device", "torch:cpu", "--threads", "1")
_ASK = """
import httpx, sys
body = {"messages": [{"role": "user", "content": "Name three fruits."}], "max_tokens": 16, "temperature": 0}
answer = httpx.post(sys.argv[1] + "/v1/chat/completions", json={"model": sys.argv[2], **body}, timeout=100)
answer.raise_for_status()
print(answer.json()["choices"][0]["message"]["content"])
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """What a head shows when it starts."""

    invite: str
    code: str


class LabPool:
    """`with LabPool(lab, head, model, options) as pool`: the head is starting. `join` starts a host. Nothing stays."""

    def __init__(
        self, lab: Lab, head: str, model: str, options: Sequence[str], *, environment: Mapping[str, str] | None = None
    ) -> None:
        self._lab = lab
        self._head = head
        self._model = model
        self._options = options
        self._environment = environment
        self._stack = ExitStack()
        self._process: CommandProcess
        self.joined: dict[str, CommandProcess] = {}

    def __enter__(self) -> Self:
        own = ("--host-name", self._head, "--port", "0", "--yes", "--json")
        self._process = self._start(self._head, ["up", self._model, *_DEVICE, *own, *self._options])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def invitation(self) -> Invitation:
        """Raises RuntimeError if the head shows none."""
        words = self._wait_for(r"potluck join '(potluck://[^']*)'")
        code = re.search(r"potluck join ([0-9A-Z]{4}-[0-9A-Z]{4})", self._process.output)
        if code is None:
            raise RuntimeError(f"the head shows no code: {self._process.last_lines()}")
        return Invitation(invite=words[1], code=code[1])

    def join(self, host: str, *how: str) -> CommandProcess:
        """`potluck join` with these arguments; without any it finds the pool that it is paired with."""
        self.joined[host] = self._start(host, ["join", *how, "--host-name", host, *_DEVICE])
        return self.joined[host]

    def load_s(self) -> float:
        """How long the last ring took to load, from the orders to the stages until all had it."""
        heard = list(self._process.lines)
        began = max(at for at, line in heard if line.startswith("Loading ") and " over " in line)
        return min(at for at, line in heard if line.startswith("Warming up") and at >= began) - began

    def wait_until_up(self, timeout_s: float) -> dict[str, Any]:
        """What the head says of itself. Raises RuntimeError, also with what the hosts say."""
        try:
            return self._process.wait_for_facts(timeout_s)
        except RuntimeError as error:
            raise RuntimeError(f"{error}; {self._joined_output()}") from error

    def status(self) -> dict[str, Any]:
        """Raises RuntimeError."""
        done = self._lab.run(
            self._head, [*CLI, "status", "--json"], limited=False, environment=self._environment, timeout_s=60.0
        )
        if done.returncode:
            raise RuntimeError(f"no status: {done.stderr.strip()}")
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def num_loads(self) -> int:
        """How often a ring was loaded."""
        return self._process.output.count("Warming up")

    def wait_for_ring(self, hosts: Sequence[str], timeout_s: float, *, loads: int = 1) -> dict[str, Any]:
        """Until one is ready with stages of these hosts, in this order, after so many loads. Raises RuntimeError."""
        deadline = time.monotonic() + timeout_s
        while True:
            report = self.status()
            found = [stage["host"] for stage in report["stages"]]
            if report["state"] == "ready" and found == list(hosts) and self.num_loads() >= loads:
                return report
            if time.monotonic() > deadline:
                what = f"{report['state']} with {found} after {timeout_s:.0f} s"
                raise RuntimeError(f"{what}: {self._process.last_lines()}; {self._joined_output()}")
            time.sleep(0.5)

    def answer(self, url: str) -> str:
        """Of the ring, to one question, without chance. Raises RuntimeError."""
        command = [sys.executable, "-c", _ASK, url, self._model]
        done = self._lab.run(self._head, command, limited=False, timeout_s=_ASKED_WITHIN_S)
        if done.returncode:
            raise RuntimeError(f"no answer: {(done.stderr.strip().splitlines() or [''])[-1]}")
        return done.stdout.strip()

    def _joined_output(self) -> str:
        return "; ".join(f"{name}: {process.last_lines()}" for name, process in self.joined.items())

    def _wait_for(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + _SHOWN_WITHIN_S
        while (found := re.search(pattern, self._process.output)) is None:
            if self._process.exit_code() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the head does not say {pattern!r}: {self._process.last_lines()}")
            time.sleep(_LOOK_S)
        return found

    def _start(self, host: str, arguments: Sequence[str]) -> CommandProcess:
        def popen(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
            environment = {"OMP_NUM_THREADS": "1", **(self._environment or {})}
            return self._lab.popen(host, command, environment=environment, **options)

        process = CommandProcess(arguments, popen)
        self._stack.callback(process.stop)
        return process


HEAD, BY_INVITE, BY_CODE = HOSTS = ("desk", "left", "right")
SECTIONS = ("alone", "moved", "ports", "revoked")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_UP_WITHIN_S = 300.0
_BACK_WITHIN_S = 180.0
_NEW_NUMBERS = {BY_INVITE: 22, HEAD: 21}
# The moment of the change in the roster's file, and the first one at which the head says that it can't serve.
_REVOKE = """
import sys, time, httpx
from devices.pairing.roster import RosterFile
from potluck.system.paths import roster_file
roster = RosterFile(roster_file())
with httpx.Client(trust_env=False) as client:
    assert client.get(sys.argv[1] + "/health").status_code == 200
    roster.revoke(sys.argv[2])
    began = time.perf_counter()
    while client.get(sys.argv[1] + "/health").status_code == 200 and time.perf_counter() < began + 30:
        time.sleep(0.005)
    print(time.perf_counter() - began)
"""

TARGETS = (
    Target(name="reported bytes over own tensors", limit=1.01, sense="at most", value=lambda found: found["fetched"]),
    # Headers of Ethernet, IP and TCP are 4 to 5 % of a full packet; on top of that comes what else the hosts say.
    Target(name="the card's bytes over own tensors", limit=1.06, sense="at most", value=lambda found: found["card"]),
    Target(
        name="reported bytes of a second start", limit=0.0, sense="at most", value=lambda found: found["fetched again"]
    ),
    Target(
        name="the card's bytes of a second start over own tensors",
        limit=0.01,
        sense="at most",
        value=lambda found: found["card again"],
    ),
    Target(
        name="loading over max(all bytes / uplink, the slowest stage alone)",
        limit=1.25,
        sense="at most",
        value=ratio("load s", "at best s"),
    ),
    Target(
        name="the longest fetch over max(all bytes / uplink, the longest fetch alone)",
        limit=1.25,
        sense="at most",
        value=ratio("fetch s", "fetch at best s"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStart:
    """One start of the pool. `load_s` is what the ring took to load, `fetch_s` the longest that a host waited for
    others. `fetched` are reported bytes by host, `received` those of its card, `own` those of its stage's tensors in
    the model's files."""

    load_s: float
    fetch_s: float
    text: str
    fetched: dict[str, int]
    received: dict[str, int]
    own: dict[str, int]

    def share(self, counted: Mapping[str, int]) -> float:
        """The largest of counted over own bytes."""
        return max(counted[host] / self.own[host] for host in self.own)


class PairingExperiment:
    """Hosts that are there; `start` starts everything in them and ends it again."""

    def __init__(self, lab: Lab, model: StoredModel, say: Callable[[str], None] = lambda line: None) -> None:
        self._lab = lab
        self._model = model
        self._say = say

    def start(
        self,
        *,
        pairs: bool = False,
        environment: Mapping[str, str] | None = None,
        meanwhile: Callable[[LabPool, dict[str, Any]], None] = lambda pool, report: None,
    ) -> PoolStart:
        """Until the ring has answered; then `meanwhile`. `pairs`: by invite and by code. Raises RuntimeError."""
        options = ("--objective", "even", "--use-all", "--estimate", "--wait-for", str(len(HOSTS)))
        before = {host: self._lab.card(host) for host in HOSTS}
        with LabPool(self._lab, HEAD, self._model.name, options, environment=environment) as pool:
            shown = pool.invitation()
            pool.join(BY_INVITE, *([shown.invite] if pairs else []))
            pool.join(BY_CODE, *(["--code", shown.code] if pairs else []))
            report = pool.wait_until_up(_UP_WITHIN_S)
            after = {host: self._lab.card(host) for host in HOSTS}
            stages = {stage["host"]: stage for stage in report["stages"] if stage["host"] != HEAD}
            if set(stages) != {BY_INVITE, BY_CODE}:
                raise RuntimeError(f"the stages are on {sorted(stage['host'] for stage in report['stages'])}")
            found = PoolStart(
                load_s=pool.load_s(),
                fetch_s=max(stage["fetch_s"] for stage in stages.values()),
                text=pool.answer(report["url"]),
                fetched={host: sum(stage["fetched"].values()) for host, stage in stages.items()},
                received={host: after[host].received - before[host].received for host in stages},
                own={host: self._own_bytes(stage["first"], stage["last"]) for host, stage in stages.items()},
            )
            meanwhile(pool, report)
        self._say(f"  {found}")
        return found

    def forget_pieces(self, host: str) -> None:
        """As if it had never been sent any."""
        for name in ("pieces", "shared"):
            shutil.rmtree(home_of(self._lab, host) / name, ignore_errors=True)

    def move(self, pool: LabPool, report: dict[str, Any]) -> None:
        """Another address for a host, and then for the head: the ring must come back, and say the same."""
        text = pool.answer(report["url"])
        for host, number in _NEW_NUMBERS.items():
            self._say(f"  {host} moves")
            loads = pool.num_loads()
            self._lab.move(host, number)
            pool.wait_for_ring(HOSTS, _BACK_WITHIN_S, loads=loads + 1)
            if pool.answer(report["url"]) != text:
                raise RuntimeError(f"another answer after {host} moved")

    def revoke(self, pool: LabPool, report: dict[str, Any]) -> float:
        """How long the ring goes on with a host that is put out; the others must serve again without it."""
        command = [sys.executable, "-c", _REVOKE, report["url"], BY_CODE]
        done = self._lab.run(HEAD, command, limited=False)
        if done.returncode:
            raise RuntimeError(f"{BY_CODE} can't be revoked: {done.stderr.strip()}")
        pool.wait_for_ring((HEAD, BY_INVITE), _BACK_WITHIN_S, loads=2)
        pool.answer(report["url"])
        return float(done.stdout)

    def _own_bytes(self, first: int, last: int) -> int:
        checkpoint = open_checkpoint(self._model.path)
        try:
            ends = {"model.embed_tokens.weight"} if first == 0 else set()
            if last == checkpoint.spec.num_layers:
                tied = checkpoint.spec.tied_embeddings
                ends |= {"model.norm.weight", "model.embed_tokens.weight" if tied else "lm_head.weight"}
            return sum(
                tensor.file_bytes
                for name, tensor in checkpoint.tensors.items()
                if name in ends or ((layer := _LAYER.match(name)) and first <= int(layer[1]) < last)
            )
        finally:
            checkpoint.close()


def lab_of_three(rate_bits_per_s: float, store: Path) -> Lab:
    """The model lies on the head alone."""
    hosts = tuple(HostSpec(name=name, rate_bits_per_s=rate_bits_per_s) for name in HOSTS)
    return Lab(LabSpec(hosts=hosts), store=store, models_on=(HEAD,))


def start_twice(experiment: PairingExperiment) -> tuple[PoolStart, PoolStart]:
    """The first start, and the second one. Raises RuntimeError if their answers differ."""
    first = experiment.start(pairs=True)
    second = experiment.start()
    if first.text != second.text:
        raise RuntimeError(f"{first.text!r}, and after a restart {second.text!r}")
    return first, second


def compare_starts(first: PoolStart, second: PoolStart, alone: Sequence[PoolStart], rate_bits_per_s: float) -> Round:
    """`alone` are starts at which one host at a time had nothing."""
    all_s = sum(first.own.values()) * 8 / rate_bits_per_s
    found = {
        "fetched": first.share(first.fetched),
        "card": first.share(first.received),
        "fetched again": second.share(second.fetched),
        "card again": second.share(second.received),
        "load s": first.load_s,
        "fetch s": first.fetch_s,
        "load again s": second.load_s,
        "all bytes over the uplink s": all_s,
    }
    if alone:
        found["slowest stage alone s"] = slowest_s = max(start.load_s for start in alone)
        found["longest fetch alone s"] = longest_s = max(start.fetch_s for start in alone)
        found |= {"at best s": max(all_s, slowest_s), "fetch at best s": max(all_s, longest_s)}
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a model of the store")
    parser.add_argument("--rate", default="200mbit", help="of each host's network card")
    parser.add_argument(
        "--only", nargs="*", choices=SECTIONS, default=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS)
    )
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)

    try:
        rate = parse_rate(options.rate)
        model = Store(home_dir()).pull(options.model, lambda _: None)
        result: dict[str, Any] = {**hardware_facts(), "model": model.name, "rate_bits_per_s": rate}
        with lab_of_three(rate, home_dir()) as lab:
            experiment = PairingExperiment(lab, model, say)
            say("two starts")
            first, second = start_twice(experiment)
            alone = []
            for host in (BY_INVITE, BY_CODE) if "alone" in options.only else ():
                say(f"the stage of {host} alone")
                experiment.forget_pieces(host)
                alone.append(experiment.start())
            values = compare_starts(first, second, alone, rate)
            result |= {"targets": judge_targets([values], TARGETS), "values": values, "own_bytes": first.own}
            if "moved" in options.only:
                say("hosts move")
                experiment.start(meanwhile=experiment.move)
                result["moved"] = True
            if "ports" in options.only:
                say("without ipc")
                result["ports"] = experiment.start(environment={"POTLUCK_NO_IPC": "1"}).text == first.text
            if "revoked" in options.only:
                say("a host is revoked")
                served_s: list[float] = []
                experiment.start(meanwhile=lambda pool, report: served_s.append(experiment.revoke(pool, report)))
                result["served_after_revoke_s"] = served_s[0]
    except (PotluckError, RuntimeError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result, indent=2))
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
