"""A lab runs commands in its hosts, which can be paired beforehand; when it is left, nothing of it stays."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from bench.lab.groups import hierarchy, make_groups, remove_groups
from bench.lab.network import (
    CARD,
    RELAY_READY,
    CardBytes,
    addresses,
    build_network,
    card_bytes,
    change_address,
    ip,
    missing_tools,
    namespace,
    remove_network,
    route_through_relay,
    try_network,
)
from bench.lab.spec import HostSpec, LabError, LabSpec
from bench.lab.state import (
    PREFIX,
    LabFacts,
    LabHostFacts,
    launch_command,
    leftovers,
    owner_start_s,
    remove_facts,
    save_facts,
)
from devices.pairing.identity import load_keys, platform_name
from devices.pairing.known_pools import KnownPool, save_known_pool
from devices.pairing.roster import RosterFile
from potluck.system.paths import home_dir

_RELAY_WITHIN_S = 10.0
_RELAY_GROUP = HostSpec(name="_relay")
_FREE_GROUP = HostSpec(name="_free")


def why_not() -> str | None:
    """Why this machine can't have a lab; None if it can."""
    if not sys.platform.startswith("linux"):
        return "a lab needs Linux"
    if os.geteuid() != 0:
        return "a lab needs root"
    if missing := missing_tools():
        return f"a lab needs {', '.join(missing)} (Debian: apt install iproute2 util-linux)"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "a lab needs /dev/net/tun"
    try:
        hierarchy()
        try_network(_new_id())
    except LabError as error:
        return f"this machine can't have a lab: {error.message}"
    return None


def remove_leftovers() -> list[str]:
    """Take down labs whose process is gone. Returns their ids. Raises LabError."""
    found = leftovers()
    for lab in found:
        take_down(lab)
    return found


def take_down(lab: str) -> None:
    """Whatever there is of it. Raises LabError if something won't go."""
    remove_groups(lab)
    remove_network(lab)
    remove_facts(lab)


class Lab:
    """`with Lab(spec) as lab: lab.run("fast", [...])`. Every host has a POTLUCK_HOME of its own, with one store."""

    def __init__(self, spec: LabSpec, *, store: Path | None = None, models_on: Sequence[str] | None = None) -> None:
        """`store` is the POTLUCK_HOME whose models the hosts share, this user's by default; `models_on` are the hosts
        that have them, all by default."""
        self._spec = spec
        self._models_on = frozenset(host.name for host in spec.hosts) if models_on is None else frozenset(models_on)
        self._store = (store or home_dir()).resolve()
        self._children: list[subprocess.Popen[Any]] = []
        self.id = _new_id()
        self.facts: LabFacts

    def __enter__(self) -> Lab:
        """Raises LabError; what a crash of another lab has left is removed first."""
        reason = why_not()
        if reason is not None:
            raise LabError(reason)
        remove_leftovers()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End what runs in the hosts and remove them."""
        take_down(self.id)
        for child in self._children:
            child.wait()

    def address(self, host: str) -> str:
        self._spec.host(host)
        return self.facts.hosts[host].address

    def unplug(self, host: str) -> None:
        """Take the host off the network: nobody is told, as when it falls asleep."""
        self._spec.host(host)
        ip("-n", self.facts.hosts[host].namespace, "link", "set", CARD, "down")

    def plug(self, host: str) -> None:
        """Back onto the network."""
        self._spec.host(host)
        ip("-n", self.facts.hosts[host].namespace, "link", "set", CARD, "up")

    def move(self, host: str, number: int) -> None:
        """Give the host another address: 10.77.0.`number`."""
        facts = self.facts.hosts[host]
        new = f"10.77.0.{number}"
        change_address(facts.namespace, facts.address, new)
        self.facts.hosts[host] = msgspec.structs.replace(facts, address=new)
        save_facts(self.facts)

    def card(self, host: str) -> CardBytes:
        """What has passed the host's network card so far."""
        self._spec.host(host)
        return card_bytes(self.facts.hosts[host].namespace)

    def environment(self) -> dict[str, str]:
        """For a process outside of the hosts: `python -m bench.lab exec` finds the lab by it."""
        return {**os.environ, "POTLUCK_LAB": str(self.facts.file)}

    def popen(
        self,
        host: str,
        command: Sequence[str],
        *,
        limited: bool = True,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start a command in a host; `options` are Popen's. Not `limited`: on its network only, for who measures."""
        self._spec.host(host)
        argv, env = launch_command(self.facts, host, command, limited=limited)
        child: subprocess.Popen[Any] = subprocess.Popen(argv, env={**env, **(environment or {})}, **options)
        self._children.append(child)
        return child

    def run(
        self,
        host: str,
        command: Sequence[str],
        *,
        limited: bool = True,
        timeout_s: float = 120.0,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A command that ends by itself, with its output. Raises subprocess.TimeoutExpired after killing it."""
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.popen(host, command, limited=limited, environment=environment, text=True, **pipes) as child:
            try:
                output, errors = child.communicate(timeout=timeout_s)
            except BaseException:
                child.kill()
                raise
        return subprocess.CompletedProcess(list(command), child.returncode, output, errors)

    def _build(self) -> None:
        known = addresses(self._spec)
        groups = hierarchy()
        self.facts = LabFacts(
            id=self.id, pid=os.getpid(), start_s=owner_start_s(os.getpid()), store=str(self._store), hosts={}
        )
        save_facts(self.facts)  # before there is anything to forget
        free = make_groups(groups, self.id, _FREE_GROUP)
        for host in self._spec.hosts:
            facts = LabHostFacts(
                address=known[host.name],
                namespace=namespace(self.id, host.name),
                groups=[str(group) for group in make_groups(groups, self.id, host)],
                free_groups=[str(group) for group in free],
                has_models=host.name in self._models_on,
            )
            self.facts.hosts[host.name] = facts
        save_facts(self.facts)
        build_network(self.id, self._spec)
        relays = [str(group) for group in make_groups(groups, self.id, _RELAY_GROUP)]
        for host in self._spec.hosts:
            self._start_relay(host, relays)

    def _start_relay(self, host: HostSpec, groups: list[str]) -> None:
        links = {
            self.facts.hosts[link.target].address: (link.delay_s, link.jitter_s, link.loss)
            for link in self._spec.links_from(host.name)
            if link.is_relayed
        }
        if not links:
            return
        command = [sys.executable, "-P", "-m", "bench.lab.relay", "--links", json.dumps(links)]
        argv, env = launch_command(self.facts, host.name, command, groups=groups)
        child = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        self._children.append(child)
        assert child.stdout is not None
        deadline = time.monotonic() + _RELAY_WITHIN_S
        with contextlib.closing(child.stdout) as output:
            said = output.readline().strip()
        if said != RELAY_READY or time.monotonic() > deadline:
            raise LabError(f"the relay of {host.name} did not start")
        route_through_relay(self.id, self._spec, host)


def _new_id() -> str:
    return f"{PREFIX}{secrets.token_hex(3)}"


PAIRING_PORT = 11501


def pair_hosts(lab: Lab, head: str, others: Sequence[str], *, port: int = PAIRING_PORT) -> str:
    """Write what pairing would leave behind: the head's roster and the others' known pools. Returns the head's door,
    "ADDRESS:PORT". A head started there with `head_options` lets the others in by `join_options`."""
    pairing_address = f"{lab.address(head)}:{port}"
    home = home_of(lab, head)
    head_key = load_keys(home / "identity").public
    roster = RosterFile(home / "roster.json", name=head)
    for name in others:
        own = home_of(lab, name)
        member = roster.add(load_keys(own / "identity").public, name, platform_name())
        pool = KnownPool(
            pool=roster.read().pool, key=head_key, name=head, my_name=member.name, doors=(pairing_address,)
        )
        save_known_pool(own / "pools.json", pool)
    return pairing_address


def head_options(lab: Lab, head: str, *, port: int = PAIRING_PORT) -> tuple[str, ...]:
    """Options of `potluck up` in that host."""
    return (*_network(lab, head), "--lan-port", str(port))


def join_options(lab: Lab, host: str, pairing_address: str) -> tuple[str, ...]:
    """Options of `potluck join` in a host that is paired."""
    return ("--head", pairing_address, *_network(lab, host))


def home_of(lab: Lab, host: str) -> Path:
    """The host's POTLUCK_HOME."""
    return lab.facts.folder / host / "home"


def _network(lab: Lab, host: str) -> tuple[str, ...]:
    return ("--no-discovery", "--lan-host", lab.address(host), "--host-name", host)
