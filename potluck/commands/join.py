"""`potluck join`: give this host's devices to a head, on this host or, unencrypted so far, on another one."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from potluck.config import Settings
from potluck.head_file import running_head
from potluck.lan import INSECURE_WARNING, ThisHost, parse_head, this_host
from potluck.node import Node
from potluck.offer import offered_devices
from potluck.options import (
    ConfigOption,
    DeviceOption,
    HostNameOption,
    InsecureLanOption,
    LanHostOption,
    MemoryOption,
    ThreadsOption,
    settings_with,
)
from potluck.paths import logs_dir, runtime_dir
from potluck.session import ending_signals
from potluck.terminal import data, gib
from transport.endpoints import tcp_endpoint
from transport.errors import ConfigError, NotRunning, PotluckError


def register(app: typer.Typer) -> None:
    app.command("join")(join)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """The head to join: its name for the user, its control socket, and what this host is there."""

    name: str
    control: str
    here: ThisHost
    prefix: str


def join(
    head: Annotated[
        str | None, typer.Option("--head", help="HOST:PORT of a head, as it prints it. Default: that of this host.")
    ] = None,
    device: DeviceOption = None,
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    insecure_lan: InsecureLanOption = False,
    lan_host: LanHostOption = None,
    host_name: HostNameOption = None,
    config: ConfigOption = None,
    name: Annotated[str | None, typer.Option("--name", help="Prefix of the devices' names in the pool.")] = None,
) -> None:
    """Add devices to a head until Ctrl-C. It takes them in as soon as nobody waits for an answer."""
    settings = settings_with(
        config,
        devices=device,
        memory=memory,
        threads=threads,
        insecure_lan=insecure_lan or None,
        lan_host=lan_host,
        host_name=host_name,
    )
    target = _head_here(settings) if head is None else _head_at(head, settings)
    if target.here.is_exposed:
        data.print(INSECURE_WARNING, soft_wrap=True)
    lost: list[PotluckError] = []
    with ending_signals():
        run_dir = Path(tempfile.mkdtemp(prefix="run-", dir=runtime_dir()))
        node = Node(
            control=target.control,
            logs=logs_dir(),
            run_dir=run_dir,
            on_exit=lambda pid, error: lost.append(error),
            address=target.here.address,
        )
        try:
            devices = offered_devices(settings, say=data.print, prefix=name or target.prefix, host=target.here.name)
            node.start(devices)
            for offered in devices:
                data.print(f"Joined {target.name} with {escape(offered.name)} ({gib(offered.free_bytes)} free)")
            while not node.all_gone():
                time.sleep(0.2)
            raise NotRunning("the head let go of this host's devices", hint=_last_words(node, lost))
        finally:
            node.stop()
            shutil.rmtree(run_dir, ignore_errors=True)


def _head_here(settings: Settings) -> _Target:
    """The head of this host, whose name and address are this host's."""
    if settings.host_name is not None or settings.lan_host is not None:
        raise ConfigError(
            "this host has the name and the address that its head gave it",
            hint="leave out --host-name and --lan-host, or say which other head with --head HOST:PORT",
        )
    head = running_head()
    here = ThisHost(name=head.host, address=head.address)
    return _Target(name=head.url, control=head.control, here=here, prefix=f"join-{os.getpid()}")


def _head_at(text: str, settings: Settings) -> _Target:
    address, port = parse_head(text, settings)
    here = this_host(settings, towards=address)
    return _Target(name=text, control=tcp_endpoint(address, port), here=here, prefix=here.name)


def _last_words(node: Node, lost: list[PotluckError]) -> str:
    """A worker's log ends with what the head said."""
    said = [words for worker in node.workers if (words := worker.child.last_words())]
    return said[0] if said else str(lost[0]) if lost else ""
