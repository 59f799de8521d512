"""200 hostile connections at once, to every port that a real head and its workers have open: does service go on?

python -m bench.hostile [--seconds 10] [--connections 200] [--model smollm2] [--json FILE]

A ring of two hosts on loopback addresses, so that the edges of worker and engine are attacked too. Meanwhile chat
requests are answered one after the other, and a third host of the pool comes in from another address than the hostile
ones': it knocks, arrives at control, and takes bytes from the piece server.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
import zmq

from bench.hardware import facts
from bench.loopback_hosts import HEAD_ADDRESS, LoopbackHosts, loopback_hosts
from potluck.paths import home_dir
from transport.control import ControlClient
from transport.curve import Curve, KeyPair, new_key_pair
from transport.errors import PotluckError
from transport.messages import PROTOCOL_VERSION
from transport.pieces.speed import link_speed
from transport.pool_messages import Arrive, PiecePeer, Welcome

THIRD_ADDRESS = "127.0.0.3"
MIB = 2**20
MOST_GROWTH_BYTES = 64 * MIB
DESCRIPTORS_BACK_WITHIN_S = 5.0
_IN_WITHIN_S = 10.0
_WARM_UP_S = 5.0
_LOOK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Chats:
    """Requests of 8 tokens one after the other."""

    answered: int
    failed: int
    median_s: float
    slowest_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """`growth_bytes` is how much more memory all processes together held at most, and at the end. `joined_s` is what
    the door, control and the pieces took to serve a host that came in during the attack, each tried `num_joins` times
    and at its slowest."""

    ports: int
    connections: int
    seconds: float
    opened: int
    pushed_bytes: int
    resident_bytes: int
    growth_bytes: int
    growth_at_end_bytes: int
    growth_by_process: dict[str, int]
    before: Chats
    during: Chats
    num_joins: int
    joined_s: dict[str, float]
    descriptors_before: int
    descriptors_most: int
    descriptors_after: int
    descriptors_back_s: float | None


def attack(hosts: LoopbackHosts, *, seconds: float, connections: int) -> Report:
    """All that listens in these hosts but the endpoint itself."""
    return _attack(_Target(hosts), seconds, connections)


class _Target:
    """A running head, its processes, and a member of its pool."""

    def __init__(self, hosts: LoopbackHosts) -> None:
        self.url, self.model, self.key = hosts.url, hosts.model, hosts.key
        self.member = new_key_pair()
        hosts.roster.add(self.member.public, "gamma", "linux")
        self.door = int(hosts.door.rpartition(":")[2])
        self.control = int(json.loads(_knock(HEAD_ADDRESS, self.door))["control_port"])
        self.processes = hosts.processes()
        found = {place for process in self.processes for place in listening(process)}
        self.places = sorted(found - {(HEAD_ADDRESS, int(self.url.rpartition(":")[2]))})
        own = [port for _, port in listening(psutil.Process(hosts.head.pid))]
        self.pieces = next(port for port in own if _gives_pieces(port, self.key, self.member))

    def resident_bytes(self) -> dict[str, int]:
        return {f"{_kind(process)} {process.pid}": process.memory_info().rss for process in self.processes}

    def descriptors(self) -> int:
        return sum(process.num_fds() for process in self.processes)


def _attack(target: _Target, seconds: float, connections: int) -> Report:
    with _Chatting(target) as chatting:
        time.sleep(_WARM_UP_S)
        before_chats = chatting.take()
        resident, descriptors = target.resident_bytes(), target.descriptors()
        joins: dict[str, list[float]] = {"door": [], "control": [], "pieces": []}
        growth: dict[str, int] = dict.fromkeys(resident, 0)
        most_growth, most_descriptors = 0, 0
        joining = threading.Thread(target=_join_again_and_again, args=(target, joins, time.monotonic() + seconds))
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
        return Report(
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
        "bench.hostile_clients",
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


class _Chatting:
    """Asks, and asks again when the answer is there."""

    def __init__(self, target: _Target) -> None:
        self._target = target
        self._times: list[float] = []
        self._failed = 0
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Chatting:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def take(self) -> Chats:
        """Since the last time."""
        with self._lock:
            times, failed = self._times, self._failed
            self._times, self._failed = [], 0
        return Chats(
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


def _join_again_and_again(target: _Target, joins: dict[str, list[float]], until_s: float) -> None:
    while time.monotonic() < until_s:
        started = time.monotonic()
        _knock(THIRD_ADDRESS, target.door)
        joins["door"].append(time.monotonic() - started)
        started = time.monotonic()
        _arrive(target)
        joins["control"].append(time.monotonic() - started)
        started = time.monotonic()
        assert _gives_pieces(target.pieces, target.key, target.member)
        joins["pieces"].append(time.monotonic() - started)
        time.sleep(0.2)


def _knock(source: str, port: int) -> bytes:
    """What the door says to one who asks from `source`."""
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


def _arrive(target: _Target) -> None:
    """Raises TimeoutError if the head does not welcome it."""
    welcomed = threading.Event()
    context: Any = zmq.Context()
    arrive = Arrive(
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
        on_message=lambda message: welcomed.set() if isinstance(message, Welcome) else None,
        on_lost=lambda: None,
        prepare=Curve(context, target.member).towards(target.key),
    )
    try:
        if not welcomed.wait(_IN_WITHIN_S):
            raise TimeoutError(f"no welcome within {_IN_WITHIN_S:.0f} s")
    finally:
        client.close()
        context.destroy(0)


def _gives_pieces(port: int, key: str, member: KeyPair) -> bool:
    context: Any = zmq.Context()
    with closing(Curve(context, member)) as curve:
        try:
            peer = PiecePeer("head", _from_elsewhere(port), key)
            link_speed(peer, curve, context, num_bytes=2**20, within_s=2.0)
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
    result = json.dumps({**facts(), "hostile": asdict(report)}, indent=1)
    print(result)
    if arguments.json is not None:
        arguments.json.write_text(result + "\n")


if __name__ == "__main__":
    main()
