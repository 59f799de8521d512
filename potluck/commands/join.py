"""`potluck join`: give this host's devices to a head, on this host or on another one."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from devices.credentials import is_invite, parse_code
from devices.members import checked_name
from potluck.config import Settings
from potluck.head_file import HeadFacts, running_head
from potluck.head_search import find_again, pool_to_join
from potluck.lan import keys_file
from potluck.leaving.in_use import joining_processes
from potluck.node import Node
from potluck.offer import offered_devices
from potluck.options import (
    ConfigOption,
    DeviceOption,
    HostNameOption,
    LanHostOption,
    MemoryOption,
    NoDiscoveryOption,
    OfflineOption,
    ThreadsOption,
    settings_with,
)
from potluck.paths import logs_dir, runtime_dir
from potluck.pool import TAKEN
from potluck.session import ending_signals
from potluck.stay import Wishes, last_words, stay
from potluck.terminal import data, gib, tell
from potluck.worker_news import WorkerNews
from transport.errors import AlreadyRunning, ConfigError, NotAllowed, NotRunning, PotluckError, VersionMismatch

_TRY_AGAIN_S = 2.0
_LONGEST_PAUSE_S = 60.0
_SHORT_S = 30.0
_FOR_GOOD = (NotAllowed, VersionMismatch)


def register(app: typer.Typer) -> None:
    app.command("join")(join)


def join(
    secret: Annotated[
        str | None,
        typer.Argument(
            metavar="[CODE or INVITE]",
            help='What the head shows: its code, or its invite, "potluck://…". Once; then neither is needed.',
        ),
    ] = None,
    head: Annotated[str | None, typer.Option("--head", help="HOST:PORT of a head's door, as it prints it.")] = None,
    code: Annotated[str | None, typer.Option("--code", help="The same as CODE.")] = None,
    device: DeviceOption = None,
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    no_discovery: NoDiscoveryOption = False,
    offline: OfflineOption = False,
    lan_host: LanHostOption = None,
    host_name: HostNameOption = None,
    config: ConfigOption = None,
    name: Annotated[str | None, typer.Option("--name", help="Prefix of the devices' names in the pool.")] = None,
) -> None:
    """Add devices to a head until Ctrl-C. It takes them in as soon as nobody waits for an answer.

    The head on this host if there is one; else the one that this host is paired with, or will pair with by INVITE or a
    code.
    """
    settings = settings_with(
        config,
        devices=device,
        memory=memory,
        threads=threads,
        no_discovery=no_discovery,
        offline=offline,
        lan_host=lan_host,
        host_name=host_name,
    )
    if name is not None:
        name = checked_name(name)
    invite = secret if secret is not None and is_invite(secret) else None
    if invite is not None and (head is not None or code is not None):
        raise ConfigError(
            "an invite says where its head is, and needs no code", hint="leave out --head and --code, or the invite"
        )
    if invite is None and (code is not None or secret is not None):
        code = parse_code(code or secret or "")
    with ending_signals():
        local = _head_here() if invite is None and head is None and code is None else None
        if local is not None:
            _join_here(local, settings, name)
        else:
            _join_there(invite or head, code, settings, name)


def _head_here() -> HeadFacts | None:
    try:
        return running_head()
    except NotRunning:
        return None


def _join_there(where: str | None, code: str | None, settings: Settings, prefix: str | None) -> None:
    """Until the user ends it, or the head for good; while the head is away, wait for it."""
    pool = pool_to_join(where, code, settings, say=_say)
    wishes = Wishes(settings=settings, prefix=prefix)
    if where is None and code is None:
        _say(f"Joining the pool of {escape(pool.name)}")
    said: set[str] = set()
    pause_s = _TRY_AGAIN_S
    while True:
        try:
            found = find_again(pool, settings)
            pool = found.pool
            began_s = time.monotonic()
            error = stay(found, wishes, say=_say)
            said.clear()  # It was in.
            # What ends soon after each start is not tried over and over.
            is_short = isinstance(error, NotRunning) and time.monotonic() - began_s < _SHORT_S
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S) if is_short else _TRY_AGAIN_S
        except _FOR_GOOD:
            raise
        except PotluckError as problem:
            error = problem
        if isinstance(error, _FOR_GOOD):
            raise error
        if isinstance(error, NotRunning) and TAKEN in error.hint and (pids := joining_processes()):
            raise AlreadyRunning(
                f"potluck join gives this host's devices already (process {pids[0]})",
                hint="stop that one; or give other devices under other names: potluck join --device DEVICE --name NAME",
            )
        if error.message not in said:
            _say(f"[yellow]{escape(error.message)}[/yellow]: waiting for {escape(pool.name)}; Ctrl-C ends it")
            if error.hint:
                _say(f"[dim]hint: {escape(error.hint)}[/dim]")
        said.add(error.message)
        time.sleep(pause_s)


def _join_here(head: HeadFacts, settings: Settings, prefix: str | None) -> None:
    """The head of this host, whose name and address are this host's."""
    if settings.host_name is not None or settings.lan_host is not None:
        raise ConfigError(
            "this host has the name and the address that its head gave it",
            hint="leave out --host-name and --lan-host, or say which other head with --head HOST:PORT",
        )
    lost: list[PotluckError] = []
    run_dir = Path(tempfile.mkdtemp(prefix="run-", dir=runtime_dir()))
    node = Node(
        control=head.control,
        logs=logs_dir(),
        run_dir=run_dir,
        on_exit=lambda pid, error: lost.append(error),
        address=head.address,
        keys_file=keys_file(exposed=head.address is not None),
    )
    try:
        devices = offered_devices(settings, say=_say, prefix=prefix or f"join-{os.getpid()}", host=head.host)
        node.start(devices)
        for offered in devices:
            _say(f"Joined {head.url} with {escape(offered.name)} ({gib(offered.free_bytes)} free)")
        news = WorkerNews([(worker.device.name, worker.child.log) for worker in node.workers])
        while not node.all_gone():
            time.sleep(0.2)
            for line in news.new():
                _say(line)
        raise NotRunning("the head let go of this host's devices", hint=last_words(node, lost))
    finally:
        node.stop()
        shutil.rmtree(run_dir, ignore_errors=True)


def _say(line: str) -> None:
    tell(data, line)
