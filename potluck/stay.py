"""A host's stay in another host's pool: from its arrival until the head or the user ends it."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import zmq
from rich.markup import escape

from devices.platform_name import platform_name
from potluck.config import Settings
from potluck.guest import Guest, Membership
from potluck.head_search import Found
from potluck.host_answers import HostAnswers
from potluck.lan import this_host
from potluck.model_share import PieceGiver
from potluck.node import Node
from potluck.offer import offered_devices
from potluck.paths import logs_dir, runtime_dir
from potluck.store import Store
from potluck.terminal import gib
from potluck.worker_news import WorkerNews
from transport.curve import Curve
from transport.endpoints import tcp_endpoint
from transport.errors import NotRunning, PotluckError

Say = Callable[[str], object]
_LOOK_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What `potluck join` was told. `prefix` is that of the devices' names; None: the host's name."""

    settings: Settings
    prefix: str | None


def stay(found: Found, wishes: Wishes, *, say: Say) -> PotluckError:
    """Give this host's devices to the head at `found`. Returns why it is over; raises what keeps this host out."""
    settings = wishes.settings
    here = this_host(settings, towards=found.address)
    assert here.keys is not None and here.address is not None
    with ExitStack() as stack:
        run_dir = Path(tempfile.mkdtemp(prefix="run-", dir=runtime_dir()))
        stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(context.destroy, 0)
        curve = Curve(context, here.keys)
        stack.callback(curve.close)
        membership = Membership()
        giver = PieceGiver(here, tcp_endpoint(here.address), membership.admits)
        stack.callback(giver.close)
        guest = Guest(
            context,
            curve,
            found.head,
            membership=membership,
            address=here.address,
            platform=platform_name(),
            pieces=giver.endpoint,
            answers=HostAnswers(Store(), giver, say=say),
        )
        stack.callback(guest.close)
        welcome = guest.wait_welcome()
        here = replace(here, name=welcome.name)
        devices = offered_devices(settings, say=say, prefix=wishes.prefix or welcome.name, host=welcome.name)
        lost: list[PotluckError] = []
        node = Node(
            control=found.head.control,
            logs=logs_dir(),
            run_dir=run_dir,
            on_exit=lambda pid, error: lost.append(error),
            address=here.address,
            keys_file=here.keys_file,
            head_key=found.head.key,
        )
        stack.callback(node.stop)
        node.start(devices)
        for offered in devices:
            say(f"Joined {escape(found.pool.name)} with {escape(offered.name)} ({gib(offered.free_bytes)} free)")
        news = WorkerNews([(worker.device.name, worker.child.log) for worker in node.workers])
        while guest.end is None and not node.all_gone():
            time.sleep(_LOOK_S)
            for line in news.new():
                say(line)
        time.sleep(_LOOK_S)  # The node's connection may say more than its workers' ends.
        return guest.end or NotRunning("this host's workers have ended", hint=last_words(node, lost))


def last_words(node: Node, lost: list[PotluckError]) -> str:
    """Why its workers ended: what the head said or what went wrong, as the end of a worker's log has it; else how its
    process ended."""
    said = [why for worker in node.workers if (why := _reason(worker.child.last_words()))]
    return said[0] if said else str(lost[0]) if lost else ""


def _reason(line: str) -> str:
    """Of a log's last line; empty if that is about something else, as where the process was killed."""
    _, stopped, reason = line.partition(" INFO stopping: ")
    return reason if stopped else "" if " INFO " in line else line
