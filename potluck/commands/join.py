"""`potluck join`: give this host's devices to the head that runs here. Other hosts come with pairing."""

from __future__ import annotations

import os
import time
from typing import Annotated

import typer
from rich.markup import escape

from potluck.head_file import running_head
from potluck.node import Node
from potluck.offer import offered_devices
from potluck.options import ConfigOption, DeviceOption, MemoryOption, ThreadsOption, settings_with
from potluck.paths import logs_dir
from potluck.session import ending_signals
from potluck.terminal import data, gib
from transport.errors import NotRunning, PotluckError


def register(app: typer.Typer) -> None:
    app.command("join")(join)


def join(
    device: DeviceOption = None,
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    name: Annotated[str | None, typer.Option("--name", help="Prefix of the devices' names in the pool.")] = None,
) -> None:
    """Add devices to the head on this host until Ctrl-C. It takes them in as soon as nobody waits for an answer."""
    settings = settings_with(config, devices=device, memory=memory, threads=threads)
    head = running_head()
    prefix = name or f"join-{os.getpid()}"
    lost: list[PotluckError] = []
    node = Node(control=head.control, logs=logs_dir(), on_exit=lambda pid, error: lost.append(error))
    with ending_signals():
        try:
            devices = offered_devices(settings, say=data.print, prefix=prefix)
            node.start(devices)
            for offered in devices:
                data.print(f"Joined {head.url} with {escape(offered.name)} ({gib(offered.free_bytes)} free)")
            while not node.all_gone():
                time.sleep(0.2)
            raise NotRunning("the head let go of this host's devices", hint=str(lost[0]) if lost else "")
        finally:
            node.stop()
