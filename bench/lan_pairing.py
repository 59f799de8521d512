"""Do three hosts become one pool as the README says? Paired by invite and by code, with the model on one of them.

python -m bench.lan_pairing [--model smollm2] [--rate 200mbit] [--only SECTION …] --json FILE

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
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.hardware import facts
from bench.lab import HostSpec, Lab, LabSpec
from bench.lab.pairing import home_of
from bench.lab.pool import LabPool
from bench.lab.spec import parse_rate
from bench.stage_report import Round, Target, judged, ratio
from potluck.paths import home_dir
from potluck.store import Store, StoredModel
from shard.open import open_checkpoint
from transport.errors import PotluckError

HEAD, BY_INVITE, BY_CODE = HOSTS = ("desk", "left", "right")
SECTIONS = ("alone", "moved", "ports", "revoked")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_UP_WITHIN_S = 300.0
_BACK_WITHIN_S = 180.0
_NEW_NUMBERS = {BY_INVITE: 22, HEAD: 21}
# The moment of the change in the roster's file, and the first one at which the head says that it can't serve.
_REVOKE = """
import sys, time, httpx
from devices.roster import RosterFile
from potluck.paths import roster_file
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
class Start:
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


class Experiment:
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
    ) -> Start:
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
            found = Start(
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


def shared_once(experiment: Experiment) -> tuple[Start, Start]:
    """The first start, and the second one. Raises RuntimeError if their answers differ."""
    first = experiment.start(pairs=True)
    second = experiment.start()
    if first.text != second.text:
        raise RuntimeError(f"{first.text!r}, and after a restart {second.text!r}")
    return first, second


def judged_starts(first: Start, second: Start, alone: Sequence[Start], rate_bits_per_s: float) -> Round:
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

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        rate = parse_rate(options.rate)
        model = Store(home_dir()).pull(options.model, lambda _: None)
        result: dict[str, Any] = {**facts(), "model": model.name, "rate_bits_per_s": rate}
        with lab_of_three(rate, home_dir()) as lab:
            experiment = Experiment(lab, model, say)
            say("two starts")
            first, second = shared_once(experiment)
            alone = []
            for host in (BY_INVITE, BY_CODE) if "alone" in options.only else ():
                say(f"the stage of {host} alone")
                experiment.forget_pieces(host)
                alone.append(experiment.start())
            values = judged_starts(first, second, alone, rate)
            result |= {"targets": judged([values], TARGETS), "values": values, "own_bytes": first.own}
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
