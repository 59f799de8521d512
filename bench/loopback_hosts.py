"""A pool of two hosts on loopback addresses, in folders of their own: paired, loaded, and serving over TCP."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from bench.head_process import CommandProcess
from devices.identity import load_keys
from devices.known_pools import KnownPool, save_known_pool
from devices.platform_name import platform_name
from devices.roster import RosterFile
from transport.curve import KeyPair
from transport.endpoints import free_port

HEAD_ADDRESS, OTHER_ADDRESS = "127.0.0.1", "127.0.0.2"
_UP_WITHIN_S = 120.0
_DEVICE = ("--device", "torch:cpu", "--threads", "1")
_PLAN = ("--use-all", "--estimate", "--objective", "proportional")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopbackHosts:
    """`door` is "ADDRESS:PORT"; `member` has the keys of the other host, and `key` is the head's."""

    head: CommandProcess
    other: CommandProcess
    url: str
    model: str
    door: str
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
        door = f"{HEAD_ADDRESS}:{port}"
        pool = KnownPool(pool=roster.read().pool, key=key, name="alpha", my_name="beta", doors=(door,))
        save_known_pool(homes["beta"] / "pools.json", pool)
        served = ("--wait-for", "2", "--lan-port", port, "--port", "0", "--json")
        head = start("alpha", HEAD_ADDRESS, "up", model, *_PLAN, *served, *options)
        _wait_for_door(head)
        other = start("beta", OTHER_ADDRESS, "join", "--head", door)
        found = head.wait_for_facts(_UP_WITHIN_S)
        yield LoopbackHosts(
            head=head,
            other=other,
            url=found["url"],
            model=found["model"],
            door=door,
            key=key,
            member=member,
            roster=roster,
        )


def _wait_for_door(head: CommandProcess) -> None:
    deadline = time.monotonic() + _UP_WITHIN_S
    while "potluck join" not in head.said:
        if time.monotonic() > deadline or head.exit_code() is not None:
            raise RuntimeError(f"it lets nobody in: {head.last_words()}")
        time.sleep(0.1)
