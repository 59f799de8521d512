"""A pool member runs this host's devices for another host's head, until the head or the user ends it."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import zmq
from rich.markup import escape

from devices.hardware.interfaces import lan_interfaces
from devices.pairing.identity import platform_name
from potluck.host.find_head import DiscoveredPool, HeadAddress
from potluck.host.local_devices import find_local_devices
from potluck.host.local_host import this_host
from potluck.host.node import Node, relay_worker_log
from potluck.host.piece_server import HostModelService, HostPieceServer
from potluck.store.store import Store
from potluck.system.byte_sizes import format_bytes
from potluck.system.paths import logs_dir, runtime_dir
from potluck.system.settings import Settings
from transport.control import REVOKED_REASON, ControlClient
from transport.errors import DeadlineExceeded, NotAllowed, NotRunning, PotluckError, RingDown, VersionMismatch
from transport.links.endpoints import port_of, tcp_endpoint
from transport.messages.control import ControlMessage, Stop
from transport.messages.pool import HostRequest, MembersChanged, NodeAccepted, NodeHello, ProbeConnection, ProbeResult
from transport.messages.ring import PROTOCOL_VERSION
from transport.security.curve import Curve
from transport.timeouts import CONTROL_ACCEPT_S


class KnownMembers:
    """Who is in the pool, as of the head's last message."""

    def __init__(self) -> None:
        self.keys: frozenset[str] = frozenset()

    def admits(self, key: str) -> bool:
        return key in self.keys


class PoolMember:
    """The membership client: the node's own connection to the head, which updates `known_members`."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        curve: Curve,
        head: HeadAddress,
        *,
        known_members: KnownMembers,
        address: str,
        pieces: str,
        model_service: HostModelService | None = None,
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        """`address` is this host's, `pieces` where its piece server is; `model_service` says what models it has.
        `on_end` is called from another thread when `end_error` is set."""
        self._changed = threading.Condition()
        # The pairing server, which always comes first, has just said that this host is paired.
        port = port_of(head.control)
        self._blocked_hint = (
            f"its pairing server does: is TCP port {port} blocked by a firewall there? See: potluck doctor"
        )
        self._known_members = known_members
        self._on_end = on_end
        self._model_service = model_service
        self._accepted: NodeAccepted | None = None
        self._probe_result: ProbeResult | None = None
        self._end_error: PotluckError | None = None
        hello = NodeHello(
            version=PROTOCOL_VERSION,
            potluck=version("potluck"),
            platform=platform_name(),
            address=address,
            pieces=pieces,
            is_wifi=any(one.is_wifi and one.address == address for one in lan_interfaces()),
            clock_s=time.time(),
        )
        self._control = ControlClient(
            context,
            head.control,
            hello,
            on_message=self._on_message,
            on_lost=self._on_lost,
            prepare=curve.client_auth(head.key),
        )

    def wait_accepted(self) -> NodeAccepted:
        """Raises the head's error, RingDown if it can't be reached or has another key, DeadlineExceeded."""
        with self._changed:
            known = self._changed.wait_for(
                lambda: self._accepted is not None or self._end_error is not None, CONTROL_ACCEPT_S
            )
            if self._accepted is not None:
                return self._accepted
            if not known or self._end_error is None:
                raise DeadlineExceeded(
                    f"the head did not let this host in within {CONTROL_ACCEPT_S:.0f} s",
                    hint=self._blocked_hint,
                )
            raise self._end_error

    def probe_connection(self, port: int, timeout_s: float) -> str:
        """Ask the head to connect to a port of this host; returns why it can't, or nothing. Raises DeadlineExceeded,
        or `end_error`."""
        with self._changed:
            self._probe_result = None
            self._control.send(ProbeConnection(port))
            self._changed.wait_for(lambda: self._probe_result is not None or self._end_error is not None, timeout_s)
            if self._probe_result is not None:
                return self._probe_result.problem
            raise self._end_error or DeadlineExceeded(
                f"the head did not answer within {timeout_s:.0f} s", hint="try again"
            )

    @property
    def end_error(self) -> PotluckError | None:
        """Why this host is no member now: NotAllowed and VersionMismatch are final, RingDown until the head is back."""
        with self._changed:
            return self._end_error

    def close(self) -> None:
        self._control.close()

    def _on_message(self, message: ControlMessage) -> None:
        if isinstance(message, HostRequest):
            if self._model_service is not None:
                self._model_service.on_request(message, lambda answer: self._control.send(answer))
            return
        with self._changed:
            match message:
                case NodeAccepted():
                    self._accepted = message
                    self._known_members.keys = frozenset(message.members)
                case MembersChanged(members=members):
                    self._known_members.keys = frozenset(members)
                case ProbeResult():
                    self._probe_result = message
                case Stop(reason=reason):
                    self._end_error = _stop_error(reason)
            self._changed.notify_all()
        if isinstance(message, Stop):
            self._on_end()

    def _on_lost(self) -> None:
        with self._changed:
            self._known_members.keys = frozenset()
            if self._accepted is not None:
                lost = RingDown("the head is gone", hint="is it up, and this network the same as its?")
            else:  # As it looks where a key is not admitted: nothing is said, the connection just ends.
                lost = RingDown("the head does not let this host in", hint=self._blocked_hint)
            self._end_error = self._end_error or lost
            self._changed.notify_all()
        self._on_end()


def _stop_error(reason: str) -> PotluckError:
    if reason == REVOKED_REASON:
        return NotAllowed(reason, hint="pair again: potluck forget, then potluck join with a new code")
    if "protocol" in reason:
        return VersionMismatch(reason, hint="bring both hosts to the same version of Potluck")
    return RingDown(reason or "the head has stopped", hint="start it again, and this host joins by itself")


Say = Callable[[str], object]
_LAST_MESSAGE_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinOptions:
    """The options of `potluck join`. `prefix` is that of the devices' names; None: the host's name."""

    settings: Settings
    prefix: str | None


def run_member(discovered: DiscoveredPool, options: JoinOptions, *, say: Say) -> PotluckError:
    """Run this host's devices for the head at `discovered`. Returns why that has ended; raises why it can't begin."""
    settings = options.settings
    here = this_host(settings, target=discovered.address)
    assert here.keys is not None and here.address is not None
    with ExitStack() as stack:
        run_dir = Path(tempfile.mkdtemp(prefix="run-", dir=runtime_dir()))
        stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(context.destroy, 0)
        curve = Curve(context, here.keys)
        stack.callback(curve.close)
        node = Node(
            control=discovered.head.control,
            logs=logs_dir(),
            run_dir=run_dir,
            address=here.address,
            keys_file=here.keys_file,
            head_key=discovered.head.key,
        )
        known_members = KnownMembers()
        piece_server = HostPieceServer(here, tcp_endpoint(here.address), known_members.admits)
        stack.callback(piece_server.close)
        member = PoolMember(
            context,
            curve,
            discovered.head,
            known_members=known_members,
            address=here.address,
            pieces=piece_server.endpoint,
            model_service=HostModelService(Store(), piece_server, say=say),
            on_end=node.ended.set,
        )
        stack.callback(member.close)
        accepted = member.wait_accepted()
        here = replace(here, name=accepted.name)
        devices = find_local_devices(settings, say=say, prefix=options.prefix or accepted.name, host=accepted.name)
        stack.callback(node.stop)
        node.start(devices)
        for device in devices:
            say(
                f"Joined {escape(discovered.pool.name)} with {escape(device.name)} ({format_bytes(device.free_bytes)} "
                "free)"
            )
        reason = relay_worker_log(node, say=say)
        if member.end_error is None:
            time.sleep(_LAST_MESSAGE_S)  # The node's connection may say more than its workers' ends.
        return member.end_error or NotRunning("this host's workers have ended", hint=reason)
