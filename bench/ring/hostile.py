"""200 hostile connections at once, to every port that a real head and its workers have open: does service go on?

python -m bench.ring.hostile [--seconds 10] [--connections 200] [--model smollm2] [--json FILE]

A ring of two hosts on loopback addresses, so that the edges of worker and engine are attacked too. Meanwhile chat
requests are answered one after the other, and a third host of the pool comes in from another address than the hostile
ones': it says hello to the pairing server, is accepted at control, and reads bytes from the piece server.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
import zmq

from devices.pairing.identity import load_keys, platform_name
from devices.pairing.known_pools import KnownPool, save_known_pool
from devices.pairing.roster import RosterFile
from potluck.measure.head_process import CommandProcess
from potluck.measure.result import hardware_facts
from potluck.system.paths import home_dir
from transport.control import ControlClient
from transport.errors import PotluckError
from transport.links.endpoints import free_port
from transport.messages.pool import NodeAccepted, NodeHello, PiecePeer
from transport.messages.ring import PROTOCOL_VERSION
from transport.pieces.client import measure_link_speed
from transport.security.curve import Curve, KeyPair, new_key_pair

HEAD_ADDRESS, OTHER_ADDRESS = "127.0.0.1", "127.0.0.2"
_UP_WITHIN_S = 120.0
_DEVICE = ("--device", "torch:cpu", "--threads", "1")
_PLAN = ("--use-all", "--estimate", "--objective", "proportional")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopbackHosts:
    """`pairing_address` is "ADDRESS:PORT"; `member` has the keys of the other host, and `key` is the head's."""

    head: CommandProcess
    other: CommandProcess
    url: str
    model: str
    pairing_address: str
    key: str
    member: KeyPair
    roster: RosterFile

    def processes(self) -> list[psutil.Process]:
        """Of both hosts."""
        roots = [psutil.Process(each.pid) for each in (self.head, self.other)]
        return [process for root in roots for process in (root, *root.children(recursive=True))]


@contextmanager
def loopback_hosts(model: str, models: Path, *, options: Sequence[str] = ()) -> Iterator[LoopbackHosts]:
    """`models` is a POTLUCK_HOME that has the model. `options` are for `potluck up`. Raises RuntimeError."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="plt-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        homes = {name: folder / name / "home" for name in ("alpha", "beta")}
        for home in homes.values():
            home.mkdir(parents=True)
            with suppress(FileNotFoundError):  # What is known of this machine's devices need not be measured again.
                shutil.copyfile(models / "probe.json", home / "probe.json")
        (homes["alpha"] / "models").symlink_to(models / "models")
        key, member = load_keys(homes["alpha"] / "identity").public, load_keys(homes["beta"] / "identity")
        roster = RosterFile(homes["alpha"] / "roster.json", name="alpha")
        roster.add(member.public, "beta", platform_name())

        def start(name: str, address: str, *arguments: str) -> CommandProcess:
            own = folder / name
            environment = {
                **os.environ,
                "POTLUCK_HOME": str(homes[name]),
                "POTLUCK_RUNTIME": str(own / "run"),
                "POTLUCK_CONFIG": str(own / "config.toml"),
            }
            network = ("--lan-host", address, "--host-name", name, "--no-discovery")
            process = CommandProcess([*arguments, *_DEVICE, *network], partial(subprocess.Popen, env=environment))
            stack.callback(process.stop)
            return process

        port = str(free_port(HEAD_ADDRESS))
        pairing_address = f"{HEAD_ADDRESS}:{port}"
        pool = KnownPool(pool=roster.read().pool, key=key, name="alpha", my_name="beta", doors=(pairing_address,))
        save_known_pool(homes["beta"] / "pools.json", pool)
        served = ("--wait-for", "2", "--lan-port", port, "--port", "0", "--json")
        head = start("alpha", HEAD_ADDRESS, "up", model, *_PLAN, *served, *options)
        _wait_for_pairing_server(head)
        other = start("beta", OTHER_ADDRESS, "join", "--head", pairing_address)
        found = head.wait_for_facts(_UP_WITHIN_S)
        yield LoopbackHosts(
            head=head,
            other=other,
            url=found["url"],
            model=found["model"],
            pairing_address=pairing_address,
            key=key,
            member=member,
            roster=roster,
        )


def _wait_for_pairing_server(head: CommandProcess) -> None:
    deadline = time.monotonic() + _UP_WITHIN_S
    while "potluck join" not in head.output:
        if time.monotonic() > deadline or head.exit_code() is not None:
            raise RuntimeError(f"the head did not open pairing within {_UP_WITHIN_S:.0f} s: {head.last_lines()}")
        time.sleep(0.1)


THIRD_ADDRESS = "127.0.0.3"
MIB = 2**20
MOST_GROWTH_BYTES = 64 * MIB
DESCRIPTORS_BACK_WITHIN_S = 5.0
_IN_WITHIN_S = 10.0
_WARM_UP_S = 5.0
_LOOK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatLatencies:
    """Requests of 8 tokens one after the other."""

    answered: int
    failed: int
    median_s: float
    slowest_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HostileReport:
    """`growth_bytes` is how much more memory all processes together held at most, and at the end. `joined_s` is what
    pairing, control and the piece server took to serve a host that came in during the attack, each tried `num_joins`
    times and at its slowest."""

    ports: int
    connections: int
    seconds: float
    opened: int
    pushed_bytes: int
    resident_bytes: int
    growth_bytes: int
    growth_at_end_bytes: int
    growth_by_process: dict[str, int]
    before: ChatLatencies
    during: ChatLatencies
    num_joins: int
    joined_s: dict[str, float]
    descriptors_before: int
    descriptors_most: int
    descriptors_after: int
    descriptors_back_s: float | None


def attack(hosts: LoopbackHosts, *, seconds: float, connections: int) -> HostileReport:
    """All that listens in these hosts but the endpoint itself."""
    return _attack(_Target(hosts), seconds, connections)


class _Target:
    """A running head, its processes, and a member of its pool."""

    def __init__(self, hosts: LoopbackHosts) -> None:
        self.url, self.model, self.key = hosts.url, hosts.model, hosts.key
        self.member = new_key_pair()
        hosts.roster.add(self.member.public, "gamma", "linux")
        self.pairing_port = int(hosts.pairing_address.rpartition(":")[2])
        self.control = int(json.loads(_send_hello(HEAD_ADDRESS, self.pairing_port))["control_port"])
        self.processes = hosts.processes()
        found = {place for process in self.processes for place in listening(process)}
        self.places = sorted(found - {(HEAD_ADDRESS, int(self.url.rpartition(":")[2]))})
        own = [port for _, port in listening(psutil.Process(hosts.head.pid))]
        self.pieces = next(port for port in own if _serves_pieces(port, self.key, self.member))

    def resident_bytes(self) -> dict[str, int]:
        return {f"{_kind(process)} {process.pid}": process.memory_info().rss for process in self.processes}

    def descriptors(self) -> int:
        return sum(process.num_fds() for process in self.processes)


def _attack(target: _Target, seconds: float, connections: int) -> HostileReport:
    with _ChatLoop(target) as chatting:
        time.sleep(_WARM_UP_S)
        before_chats = chatting.take()
        resident, descriptors = target.resident_bytes(), target.descriptors()
        joins: dict[str, list[float]] = {"pairing": [], "control": [], "pieces": []}
        growth: dict[str, int] = dict.fromkeys(resident, 0)
        most_growth, most_descriptors = 0, 0
        joining = threading.Thread(target=_join_repeatedly, args=(target, joins, time.monotonic() + seconds))
        hostile = _start_hostile(target, seconds, connections)
        time.sleep(0.5)
        joining.start()
        while hostile.poll() is None:
            now = target.resident_bytes()
            for name, num_bytes in now.items():
                growth[name] = max(growth[name], num_bytes - resident[name])
            most_growth = max(most_growth, sum(now.values()) - sum(resident.values()))
            most_descriptors = max(most_descriptors, target.descriptors())
            time.sleep(_LOOK_EVERY_S)
        during_chats = chatting.take()
        joining.join()
        back_s = _time_until_back(target, descriptors)
        assert hostile.stdout is not None
        done = json.loads(hostile.stdout.read())
        return HostileReport(
            ports=len(target.places),
            connections=connections,
            seconds=seconds,
            opened=done["opened"],
            pushed_bytes=done["pushed_bytes"],
            resident_bytes=sum(resident.values()),
            growth_bytes=most_growth,
            growth_at_end_bytes=sum(target.resident_bytes().values()) - sum(resident.values()),
            growth_by_process=growth,
            before=before_chats,
            during=during_chats,
            num_joins=min(len(times) for times in joins.values()),
            joined_s={name: round(max(times), 3) for name, times in joins.items() if times},
            descriptors_before=descriptors,
            descriptors_most=most_descriptors,
            descriptors_after=target.descriptors(),
            descriptors_back_s=back_s,
        )


def _start_hostile(target: _Target, seconds: float, connections: int) -> subprocess.Popen[str]:
    options = ["--seconds", str(seconds), "--connections", str(connections), f"--server-key={target.key}"]
    command = [
        sys.executable,
        "-m",
        "bench.ring.hostile_clients",
        *options,
        *(f"{address}:{port}" for address, port in target.places),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _time_until_back(target: _Target, descriptors: int) -> float | None:
    """Seconds until there are no more than before; None if that takes too long. A chat's own connection may be open."""
    started = time.monotonic()
    while time.monotonic() - started < DESCRIPTORS_BACK_WITHIN_S:
        if target.descriptors() <= descriptors + 1:
            return round(time.monotonic() - started, 2)
        time.sleep(_LOOK_EVERY_S)
    return None


class _ChatLoop:
    """Asks, and asks again when the answer is there."""

    def __init__(self, target: _Target) -> None:
        self._target = target
        self._times: list[float] = []
        self._failed = 0
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _ChatLoop:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def take(self) -> ChatLatencies:
        """Since the last time."""
        with self._lock:
            times, failed = self._times, self._failed
            self._times, self._failed = [], 0
        return ChatLatencies(
            answered=len(times),
            failed=failed,
            median_s=round(median(times), 3) if times else 0.0,
            slowest_s=round(max(times), 3) if times else 0.0,
        )

    def _run(self) -> None:
        body = {
            "model": self._target.model,
            "messages": [{"role": "user", "content": "Name three fruits."}],
            "max_tokens": 8,
            "temperature": 0,
        }
        with httpx.Client(timeout=60.0, trust_env=False) as client:
            while not self._ending.is_set():
                started = time.monotonic()
                try:
                    is_right = client.post(f"{self._target.url}/v1/chat/completions", json=body).status_code == 200
                except httpx.HTTPError:
                    is_right = False
                with self._lock:
                    self._failed += not is_right
                    self._times += [time.monotonic() - started] if is_right else []
                self._ending.wait(0.02 if is_right else 0.5)


def _join_repeatedly(target: _Target, joins: dict[str, list[float]], until_s: float) -> None:
    while time.monotonic() < until_s:
        started = time.monotonic()
        _send_hello(THIRD_ADDRESS, target.pairing_port)
        joins["pairing"].append(time.monotonic() - started)
        started = time.monotonic()
        _connect_control(target)
        joins["control"].append(time.monotonic() - started)
        started = time.monotonic()
        assert _serves_pieces(target.pieces, target.key, target.member)
        joins["pieces"].append(time.monotonic() - started)
        time.sleep(0.2)


def _send_hello(source: str, port: int) -> bytes:
    """The pairing server's reply to a client at `source`."""
    with _connection(source, port) as sock:
        sock.sendall(b'{"type":"hello","protocol":%d,"potluck":"0"}\n' % PROTOCOL_VERSION)
        answer: bytes = sock.makefile("rb").readline()
        return answer


@contextmanager
def _connection(source: str, port: int) -> Iterator[Any]:
    with socket.create_connection((HEAD_ADDRESS, port), _IN_WITHIN_S, source_address=(source, 0)) as sock:
        yield sock


def _from_elsewhere(port: int) -> str:
    """ZeroMQ's way to write from where to connect."""
    return f"tcp://{THIRD_ADDRESS}:0;{HEAD_ADDRESS}:{port}"


def _connect_control(target: _Target) -> None:
    """Raises TimeoutError if the head does not accept it."""
    accepted = threading.Event()
    context: Any = zmq.Context()
    arrive = NodeHello(
        version=PROTOCOL_VERSION,
        potluck="0",
        platform="linux",
        address=THIRD_ADDRESS,
        pieces=f"tcp://{THIRD_ADDRESS}:1",
    )
    client = ControlClient(
        context,
        _from_elsewhere(target.control),
        arrive,
        on_message=lambda message: accepted.set() if isinstance(message, NodeAccepted) else None,
        on_lost=lambda: None,
        prepare=Curve(context, target.member).client_auth(target.key),
    )
    try:
        if not accepted.wait(_IN_WITHIN_S):
            raise TimeoutError(f"not accepted within {_IN_WITHIN_S:.0f} s")
    finally:
        client.close()
        context.destroy(0)


def _serves_pieces(port: int, key: str, member: KeyPair) -> bool:
    context: Any = zmq.Context()
    with closing(Curve(context, member)) as curve:
        try:
            peer = PiecePeer("head", _from_elsewhere(port), key)
            measure_link_speed(peer, curve, context, num_bytes=2**20, within_s=2.0)
            return True
        except PotluckError:
            return False
        finally:
            context.destroy(0)


def listening(process: psutil.Process) -> list[tuple[str, int]]:
    """The addresses and ports where it does."""
    return [
        (each.laddr.ip, each.laddr.port)
        for each in process.net_connections("tcp4")
        if each.status == psutil.CONN_LISTEN
    ]


def _kind(process: psutil.Process) -> str:
    """The module that it runs."""
    line = process.cmdline()
    return line[line.index("-m") + 1] if "-m" in line else Path(line[0]).name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--models", type=Path, help="a POTLUCK_HOME that has the model; default: yours")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with loopback_hosts(arguments.model, arguments.models or home_dir()) as hosts:
        report = attack(hosts, seconds=arguments.seconds, connections=arguments.connections)
    result = json.dumps({**hardware_facts(), "hostile": asdict(report)}, indent=1)
    print(result)
    if arguments.json is not None:
        arguments.json.write_text(result + "\n")


if __name__ == "__main__":
    main()
