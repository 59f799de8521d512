"""Control: who is heard, who is told what, and who is given up. Real sockets, at home and on the loopback network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from tests.support.transport.introductions import ARRIVE, REGISTER, wait_until
from transport import control
from transport.control import ControlClient, ControlPeer, ControlServer, Introduction
from transport.errors import ConfigError
from transport.messages.control import ControlMessage, StatsRequest, Stop
from transport.messages.measure import ProfileProgress
from transport.messages.pool import MembersChanged
from transport.messages.ring import PROTOCOL_VERSION
from transport.security.curve import Curve, Guard, KeyPair, new_key_pair


class Head:
    """Listens at home by ipc, and on the network for `members`."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.context: Any = zmq.Context()
        stack.callback(self.context.destroy, 0)
        self.keys = new_key_pair()
        curve = Curve(self.context, self.keys)
        stack.callback(curve.close)
        self.members: set[str] = set()
        self.heard: list[tuple[ControlPeer, ControlMessage]] = []
        self.lost: list[ControlPeer] = []
        guard = curve.guard(self.members.__contains__)
        self.server = ControlServer(
            self.context,
            [(f"ipc://{folder}/control", None), ("tcp://127.0.0.1:*", guard)],
            on_message=lambda peer, message: self.heard.append((peer, message)),
            on_lost=self.lost.append,
        )
        stack.callback(self.server.close)
        self.home, self.network = self.server.endpoints

    def messages(self) -> list[ControlMessage]:
        return [message for _, message in self.heard]

    def peer_that_said(self, message: ControlMessage) -> ControlPeer:
        wait_until(lambda: message in self.messages())
        return next(peer for peer, said in self.heard if said == message)


class Client:
    def __init__(
        self,
        head: Head,
        stack: ExitStack,
        introduction: Introduction,
        *,
        keys: KeyPair | None = None,
        server_key: str | None = None,
    ) -> None:
        """Without keys it comes in at home."""
        context: Any = zmq.Context()
        stack.callback(context.destroy, 0)
        self.told: list[ControlMessage] = []
        self.lost: list[bool] = []
        self.control = ControlClient(
            context,
            head.home if keys is None else head.network,
            introduction,
            on_message=self.told.append,
            on_lost=lambda: self.lost.append(True),
            prepare=None if keys is None else Curve(context, keys).client_auth(server_key or head.keys.public),
        )
        stack.callback(self.control.close)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def head(tmp_path: Path, stack: ExitStack) -> Head:
    return Head(tmp_path, stack)


def member(head: Head) -> KeyPair:
    keys = new_key_pair()
    head.members.add(keys.public)
    return keys


def test_processes_of_this_host_have_no_key_and_others_have_their_own(head: Head, stack: ExitStack) -> None:
    keys = member(head)
    Client(head, stack, REGISTER)
    Client(head, stack, ARRIVE, keys=keys)
    assert head.peer_that_said(REGISTER).key == ""
    assert head.peer_that_said(ARRIVE).key == keys.public


def test_each_is_told_what_is_meant_for_it(head: Head, stack: ExitStack) -> None:
    at_home = Client(head, stack, REGISTER)
    host = Client(head, stack, ARRIVE, keys=member(head))
    head.server.send(head.peer_that_said(REGISTER), StatsRequest(1))
    head.server.send(head.peer_that_said(ARRIVE), MembersChanged(("a key",)))
    wait_until(lambda: bool(at_home.told and host.told))
    assert (at_home.told, host.told) == ([StatsRequest(1)], [MembersChanged(("a key",))])


def test_all_that_a_peer_says_comes_in_order_after_its_introduction(head: Head, stack: ExitStack) -> None:
    client = Client(head, stack, ARRIVE, keys=member(head))
    for number in range(200):
        client.control.send(ProfileProgress(number, "something"))
    wait_until(lambda: len(head.heard) == 201)
    assert head.messages() == [ARRIVE, *[ProfileProgress(number, "something") for number in range(200)]]
    assert len({peer.identity for peer, _ in head.heard}) == 1


def test_nobody_is_heard_who_is_no_member(head: Head, stack: ExitStack) -> None:
    Client(head, stack, ARRIVE, keys=new_key_pair())
    Client(head, stack, REGISTER, keys=member(head), server_key=new_key_pair().public)
    time.sleep(0.3)
    Client(head, stack, ARRIVE, keys=member(head))
    head.peer_that_said(ARRIVE)
    assert len(head.heard) == 1


def test_who_speaks_another_protocol_is_told_so(head: Head, stack: ExitStack) -> None:
    for introduction in (REGISTER, ARRIVE):
        other = msgspec.structs.replace(introduction, version=PROTOCOL_VERSION + 1)
        client = Client(head, stack, other, keys=member(head))
        wait_until(lambda client=client: bool(client.told))  # type: ignore[misc]
        [stop] = client.told
        assert isinstance(stop, Stop)
        assert str(PROTOCOL_VERSION) in stop.reason and str(PROTOCOL_VERSION + 1) in stop.reason
        client.control.send(ProfileProgress(1, "all the same"))
    time.sleep(0.3)
    assert head.heard == []


def test_who_is_revoked_is_told_so_and_lost_and_not_heard(head: Head, stack: ExitStack) -> None:
    keys, other_keys = member(head), member(head)
    client = Client(head, stack, ARRIVE, keys=keys)
    other = Client(head, stack, REGISTER, keys=other_keys)
    gone, stays = head.peer_that_said(ARRIVE), head.peer_that_said(REGISTER)
    head.members.remove(keys.public)
    wait_until(lambda: bool(head.lost and client.told))
    assert head.lost == [gone]
    [stop] = client.told
    assert isinstance(stop, Stop) and "revoked" in stop.reason
    before = len(head.heard)
    client.control.send(ProfileProgress(1, "all the same"))
    head.server.send(gone, StatsRequest(1))
    other.control.send(ProfileProgress(2, "another"))
    assert head.peer_that_said(ProfileProgress(2, "another")) == stays
    time.sleep(0.2)
    assert len(head.heard) == before + 1
    assert len(client.told) == 1


def test_who_is_silent_is_given_up_and_who_is_idle_is_not(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "CONTROL_SILENT_S", 3.0)
    monkeypatch.setattr(control, "CONTROL_HEARTBEAT_S", 0.1)
    head = Head(tmp_path, stack)
    Client(head, stack, ARRIVE, keys=member(head))
    idle = head.peer_that_said(ARRIVE)
    sock = stack.enter_context(head.context.socket(zmq.DEALER))
    sock.connect(head.home)
    sock.send(msgspec.msgpack.encode(REGISTER))
    silent = head.peer_that_said(REGISTER)
    wait_until(lambda: bool(head.lost))
    assert head.lost == [silent]
    assert idle not in head.lost


def test_a_worker_that_ends_is_noticed_when_it_is_sent_something(head: Head, stack: ExitStack) -> None:
    client = Client(head, stack, ARRIVE, keys=member(head))
    peer = head.peer_that_said(ARRIVE)
    client.control.close()
    wait_until(lambda: head.server.send(peer, StatsRequest(1)) is None and bool(head.lost))
    assert head.lost == [peer]


def test_a_head_that_ends_is_noticed(head: Head, stack: ExitStack) -> None:
    client = Client(head, stack, ARRIVE, keys=member(head))
    head.peer_that_said(ARRIVE)
    head.server.close()
    wait_until(lambda: bool(client.lost))


def test_a_head_that_was_never_there_is_noticed(head: Head, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "CONTROL_CONNECT_S", 0.3)
    client = Client(head, stack, ARRIVE, keys=new_key_pair())
    wait_until(lambda: bool(client.lost))
    assert head.heard == []


def raw_dealer(head: Head, stack: ExitStack, keys: KeyPair, **options: Any) -> Any:
    context: Any = zmq.Context()
    stack.callback(context.destroy, 0)
    sock = context.socket(zmq.DEALER)
    for option, value in options.items():
        sock.set(getattr(zmq, option), value)
    Curve(context, keys).client_auth(head.keys.public)(sock)
    sock.connect(head.network)
    return sock


def test_a_name_of_a_peers_own_choice_is_not_heard(head: Head, stack: ExitStack) -> None:
    """When its owner is away for a moment another member could take it over."""
    sock = raw_dealer(head, stack, member(head), ROUTING_ID=b"a name")
    sock.send(msgspec.msgpack.encode(ARRIVE))
    wait_until(lambda: head.server.num_refused == 1)
    assert head.heard == []


@pytest.mark.parametrize(
    "frames",
    [
        [msgspec.msgpack.encode(ARRIVE), b"more"],
        [b""],
        [b"garbage"],
        [msgspec.msgpack.encode(ProfileProgress(1, "without an introduction"))],
    ],
)
def test_what_is_no_introduction_is_refused_and_an_introduction_after_it_is_not(
    head: Head, stack: ExitStack, frames: list[bytes]
) -> None:
    sock = raw_dealer(head, stack, member(head))
    sock.send_multipart(frames)
    sock.send(msgspec.msgpack.encode(ARRIVE))
    head.peer_that_said(ARRIVE)
    assert head.messages() == [ARRIVE]
    assert head.server.num_refused == 1


def test_a_place_that_is_taken_is_an_error_of_its_own(head: Head) -> None:
    nobody = Guard(prepare=lambda sock: None, is_authorized=lambda key: False)
    with pytest.raises(ConfigError, match=head.network):
        ControlServer(
            head.context,
            [(head.network, nobody)],
            on_message=lambda peer, message: None,
            on_lost=lambda peer: None,
        )


def test_a_message_that_makes_trouble_costs_its_sender_and_nobody_else(
    head: Head, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one host of the pool could end it for all the others."""
    keys, others = member(head), member(head)
    bad = Client(head, stack, REGISTER, keys=keys)
    good = Client(head, stack, ARRIVE, keys=others)
    sender = head.peer_that_said(REGISTER)
    head.peer_that_said(ARRIVE)

    def trip(peer: ControlPeer, message: ControlMessage) -> None:
        if message == StatsRequest(13):
            raise ValueError("a number of too many digits")
        head.heard.append((peer, message))

    monkeypatch.setattr(head.server, "_on_message", trip)
    bad.control.send(StatsRequest(13))
    wait_until(lambda: head.lost == [sender])
    good.control.send(StatsRequest(12))
    wait_until(lambda: StatsRequest(12) in head.messages())


def test_a_worker_that_can_not_understand_its_head_does_not_wait_for_ever(
    head: Head, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(head, stack, ARRIVE, keys=member(head))
    peer = head.peer_that_said(ARRIVE)
    monkeypatch.setattr(control, "encode", lambda message: b"\xc1")
    head.server.send(peer, StatsRequest(1))
    wait_until(lambda: bool(client.lost))
