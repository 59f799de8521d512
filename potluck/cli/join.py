"""`potluck join` gives this host's devices to a head, on this host or on another one."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from devices.pairing.credentials import is_invite, parse_code
from devices.pairing.roster import checked_name
from potluck.cli.options import with_settings
from potluck.cli.running_processes import joining_processes
from potluck.cli.session import ending_signals
from potluck.cli.terminal import show_line, stdout
from potluck.head.pool import NAME_TAKEN
from potluck.host.find_head import locate_head, pool_to_join
from potluck.host.local_devices import find_local_devices
from potluck.host.local_head import LocalHead, running_head
from potluck.host.local_host import keys_file
from potluck.host.member import JoinOptions, run_member
from potluck.host.node import Node, relay_worker_log
from potluck.system.byte_sizes import format_bytes
from potluck.system.paths import logs_dir, runtime_dir
from potluck.system.settings import Settings
from transport.errors import AlreadyRunning, ConfigError, NotAllowed, NotRunning, PotluckError, VersionMismatch

_RETRY_S = 2.0
_MAX_RETRY_S = 60.0
_MIN_CONNECTED_S = 30.0
_FATAL = (NotAllowed, VersionMismatch)


@with_settings("device", "memory", "threads", "discovery", "offline", "lan_host", "host_name")
def join(
    settings: Settings,
    secret: Annotated[
        str | None,
        typer.Argument(
            metavar="[CODE or INVITE]",
            help='What the head shows: its code, or its invite, "potluck://…". Once; then neither is needed.',
        ),
    ] = None,
    head: Annotated[str | None, typer.Option("--head", help="HOST:PORT of a head's door, as it prints it.")] = None,
    code: Annotated[str | None, typer.Option("--code", help="The same as CODE.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Prefix of the devices' names in the pool.")] = None,
) -> None:
    """Add devices to a head until Ctrl-C. It takes them in as soon as nobody waits for an answer.

    The head on this host if there is one; else the one that this host is paired with, or will pair with by INVITE or a
    code.
    """
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
        local = _local_head() if invite is None and head is None and code is None else None
        if local is not None:
            _join_local_head(local, settings, name)
        else:
            _join_remote_head(invite or head, code, settings, name)


def _local_head() -> LocalHead | None:
    try:
        return running_head()
    except NotRunning:
        return None


def _join_remote_head(address_or_invite: str | None, code: str | None, settings: Settings, prefix: str | None) -> None:
    """Until the user ends it, or the head for good; while the head is away, wait for it."""
    pool = pool_to_join(address_or_invite, code, settings, say=_say, prompt=_prompt)
    options = JoinOptions(settings=settings, prefix=prefix)
    if address_or_invite is None and code is None:
        _say(f"Joining the pool of {escape(pool.name)}")
    shown: set[str] = set()
    pause_s = _RETRY_S
    while True:
        try:
            found = locate_head(pool, settings)
            pool = found.pool
            began_s = time.monotonic()
            error = run_member(found, options, say=_say)
            shown.clear()  # It was in.
            # What ends soon after each start is not tried over and over.
            is_short = isinstance(error, NotRunning) and time.monotonic() - began_s < _MIN_CONNECTED_S
            pause_s = min(2 * pause_s, _MAX_RETRY_S) if is_short else _RETRY_S
        except _FATAL:
            raise
        except PotluckError as problem:
            error = problem
        if isinstance(error, _FATAL):
            raise error
        if isinstance(error, NotRunning) and NAME_TAKEN in error.hint and (pids := joining_processes()):
            raise AlreadyRunning(
                f"potluck join gives this host's devices already (process {pids[0]})",
                hint="stop that one; or give other devices under other names: potluck join --device DEVICE --name NAME",
            )
        if error.message not in shown:
            _say(f"[yellow]{escape(error.message)}[/yellow]: waiting for {escape(pool.name)}; Ctrl-C ends it")
            if error.hint:
                _say(f"[dim]hint: {escape(error.hint)}[/dim]")
        shown.add(error.message)
        time.sleep(pause_s)


def _join_local_head(head: LocalHead, settings: Settings, prefix: str | None) -> None:
    """The head of this host, whose name and address are this host's."""
    if settings.host_name is not None or settings.lan_host is not None:
        raise ConfigError(
            "this host has the name and the address that its head gave it",
            hint="leave out --host-name and --lan-host, or say which other head with --head HOST:PORT",
        )
    run_dir = Path(tempfile.mkdtemp(prefix="run-", dir=runtime_dir()))
    node = Node(
        control=head.control,
        logs=logs_dir(),
        run_dir=run_dir,
        address=head.address,
        keys_file=keys_file(exposed=head.address is not None),
    )
    try:
        devices = find_local_devices(settings, say=_say, prefix=prefix or f"join-{os.getpid()}", host=head.host)
        node.start(devices)
        for device in devices:
            _say(f"Joined {head.url} with {escape(device.name)} ({format_bytes(device.free_bytes)} free)")
        raise NotRunning("the head let go of this host's devices", hint=relay_worker_log(node, say=_say))
    finally:
        node.stop()
        shutil.rmtree(run_dir, ignore_errors=True)


def _prompt(question: str) -> str | None:
    try:
        return input(question) if sys.stdin.isatty() else None
    except EOFError:
        return None


def _say(line: str) -> None:
    show_line(stdout, line)
