"""A lab runs commands in its hosts, which can be paired beforehand; when it is left, nothing of it stays."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import psutil
from msgspec import Struct

from bench.lab.groups import hierarchy, labs_with_groups, make_groups, remove_groups
from bench.lab.network import (
    CARD,
    NAMESPACES,
    RELAY_READY,
    CardBytes,
    addresses,
    build_network,
    card_bytes,
    change_address,
    ip,
    labs_with_network,
    missing_tools,
    namespace,
    remove_network,
    route_through_relay,
    try_network,
)
from bench.lab.spec import HostSpec, LabError, LabSpec
from devices.pairing.identity import load_keys, platform_name
from devices.pairing.known_pools import KnownPool, save_known_pool
from devices.pairing.roster import RosterFile
from potluck.system.paths import home_dir

PREFIX = "plab"
STATE_DIR = Path("/run/potluck-lab")
_FILE = "lab.json"
_SAME_START_S = 2.0
# The shell's own process becomes the command: its id is in the groups first, then it enters the namespace. Not by
# `ip netns exec`, which hides /sys/fs/cgroup and with it the host's limits.
_LAUNCH = 'for group in $LAB_GROUPS; do echo $$ > "$group/cgroup.procs" || exit 125; done; unset LAB_GROUPS; exec "$@"'


class LabHostFacts(Struct, frozen=True, kw_only=True):
    """One host: processes in `groups` have its limits, those in `free_groups` only its network; `has_models`: those of
    the lab's store."""

    address: str
    namespace: str
    groups: list[str]
    free_groups: list[str]
    has_models: bool = True


class LabFacts(Struct, frozen=True, kw_only=True):
    """`pid` and `start_s` are of the process that the lab belongs to; `store` is the POTLUCK_HOME with the models."""

    id: str
    pid: int
    start_s: float
    store: str
    hosts: dict[str, LabHostFacts]

    @property
    def folder(self) -> Path:
        return STATE_DIR / self.id

    @property
    def file(self) -> Path:
        return self.folder / _FILE


def save_facts(facts: LabFacts) -> None:
    """The folder appears with its file in it."""
    draft = STATE_DIR / f".{facts.id}"
    draft.mkdir(mode=0o700, parents=True, exist_ok=True)
    (draft / _FILE).write_bytes(msgspec.json.encode(facts))
    if facts.folder.exists():
        (draft / _FILE).replace(facts.file)
        draft.rmdir()
    else:
        draft.rename(facts.folder)
    for name in facts.hosts:
        _make_home(facts, name)


def remove_facts(lab: str) -> None:
    for folder in (STATE_DIR / lab, STATE_DIR / f".{lab}"):
        shutil.rmtree(folder, ignore_errors=True)


def read_facts(file: Path) -> LabFacts:
    """Raises LabError."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=LabFacts)
    except (OSError, msgspec.DecodeError) as error:
        raise LabError(f"no lab is up at {file}: {error}", hint="start one: python -m bench.lab up FILE") from error


def running_lab() -> LabFacts:
    """That of POTLUCK_LAB, or the only one. Raises LabError."""
    if named := os.environ.get("POTLUCK_LAB"):
        return read_facts(Path(named))
    found = [facts for facts in _all() if is_alive(facts)]
    if len(found) != 1:
        raise LabError(
            f"{len(found)} labs are up",
            hint="start one: python -m bench.lab up FILE" if not found else "say which: POTLUCK_LAB=…/lab.json",
        )
    return found[0]


def leftovers() -> list[str]:
    """Ids of labs whose process is gone, however little there is left of them."""
    alive = {facts.id for facts in _all() if is_alive(facts)}
    folders = {folder.name.removeprefix(".") for folder in STATE_DIR.glob(f"*{PREFIX}*")}
    return sorted((folders | labs_with_groups(PREFIX) | labs_with_network(PREFIX)) - alive)


def is_alive(facts: LabFacts) -> bool:
    # A step of the wall clock moves both times by different fractions.
    return abs(owner_start_s(facts.pid) - facts.start_s) < _SAME_START_S


def owner_start_s(pid: int) -> float:
    """When a process started; 0 if there is none."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return 0.0


def launch_command(
    facts: LabFacts,
    host: str,
    command: Sequence[str],
    *,
    limited: bool = True,
    groups: Sequence[str] | None = None,
) -> tuple[list[str], dict[str, str]]:
    """What starts `command` in a host, and its environment. `groups` are others than the host's own."""
    found = facts.hosts.get(host)
    if found is None:
        raise LabError(f"the lab has no host {host!r}", hint=f"its hosts are: {', '.join(facts.hosts)}")
    chosen = groups if groups is not None else found.groups if limited else found.free_groups
    home = facts.folder / host
    enter = ["nsenter", f"--net={NAMESPACES / found.namespace}", "--", *command]
    environment = {
        **os.environ,
        "LAB_GROUPS": " ".join(chosen),
        "POTLUCK_LAB": str(facts.file),
        "POTLUCK_LAB_HOST": host,
        "POTLUCK_HOME": str(home / "home"),
        "POTLUCK_RUNTIME": str(home / "run"),
        "POTLUCK_CONFIG": str(home / "config.toml"),
    }
    return ["sh", "-c", _LAUNCH, "sh", *enter], environment


def _all() -> list[LabFacts]:
    found = []
    for file in STATE_DIR.glob(f"{PREFIX}*/{_FILE}"):
        try:
            found.append(read_facts(file))
        except LabError:
            continue  # being removed, or broken: then it is a leftover
    return found


def _make_home(facts: LabFacts, host: str) -> None:
    home = facts.folder / host / "home"
    home.mkdir(parents=True, exist_ok=True)
    models = home / "models"
    if not facts.hosts[host].has_models:
        models.mkdir(exist_ok=True)
    elif not models.is_symlink():
        (Path(facts.store) / "models").mkdir(parents=True, exist_ok=True)
        models.symlink_to(Path(facts.store) / "models")


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
