"""Six attackers at every kind of socket that listens on a network: nothing that they send reaches the application, and
the honest member is served throughout."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq

from devices.pairing.roster import RosterFile
from tests.support.security.attackers import (
    CHOSEN,
    RecordingRelay,
    dealer,
    frame,
    greeting,
    hello,
    insist,
    messages,
    push,
    raw,
    ready,
)
from tests.support.security.endless import CUT_OFF, start_endless
from tests.support.security.targets import KINDS, Control, DataEdge, Pieces, Setting, Target, is_served, resident_bytes
from transport.messages.pieces import PieceRequest
from transport.messages.pieces import encode as encode_request
from transport.security.curve import KeyPair, new_key_pair

MIB = 2**20
HUGE = (2**31, 2**63 - 1, 2**64 - 1)
# An array, a map, a binary, a string and an extension that announce 2³¹ parts or bytes, and arrays in arrays in arrays.
LYING = [
    head + (2**31).to_bytes(4, "big") for head in (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9", b"\x92\xa6tokens\xdd")
] + [b"\x91" * 100_000]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    target = request.param()
    try:
        yield target
        assert is_served(target)
        assert not target.is_reached()
    finally:
        target.close()


def raw_openings(target: Target) -> dict[str, bytes]:
    says = messages(target.says)
    short = [part for frames in target.says for part in frames if len(part) < 255]
    return {
        "garbage": os.urandom(4096),
        "http": b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "half a greeting": greeting()[:20],
        "NULL, and messages": greeting() + ready() + says,
        "CURVE by name, and messages": greeting(b"CURVE") + ready() + says,
        "CURVE's hello of noise": greeting(b"CURVE") + hello() + says,
        "PLAIN": greeting(b"PLAIN") + frame(b"\x05HELLO\x01a\x01b", 4) + says,
        "ZMTP 2.0": b"\xff" + bytes(8) + b"\x7f\x01\x05\x00\x00" + says,
        "ZMTP 1.0": b"\x01\x00" + b"".join(bytes((len(part) + 1, 0)) + part for part in short),
    }


def test_no_encryption(target: Target) -> None:
    with dealer(target.endpoint, None) as sock:
        insist(sock, target.says, for_s=0.3)
        assert is_served(target)
        assert not sock.poll(0)
    for data in raw_openings(target).values():
        with raw(target.endpoint) as connection:
            push(connection, data)
            assert is_served(target)


def test_a_random_key(target: Target) -> None:
    with dealer(target.endpoint, new_key_pair(), target.keys.public) as sock:
        insist(sock, target.says, for_s=0.5)
        assert is_served(target)
        assert not sock.poll(0)


def test_a_key_that_is_revoked(target: Target) -> None:
    revoked = new_key_pair()
    target.members.add(revoked.public)
    with dealer(target.endpoint, revoked, target.keys.public, ROUTING_ID=CHOSEN) as sock:
        assert sock.poll(60_000, 2)  # It is connected,
        target.members.remove(revoked.public)
        insist(sock, target.says, for_s=0.3)  # and heard no more.
        assert is_served(target)
    with dealer(target.endpoint, revoked, target.keys.public, IMMEDIATE=1) as sock:
        insist(sock, target.says, for_s=0.3)
        assert is_served(target)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_live_connection_is_not_heard_once_its_key_is_revoked_by_another_process(kind: Any, tmp_path: Path) -> None:
    roster, keys = RosterFile(tmp_path / "roster.json"), new_key_pair()
    roster.add(keys.public, "beta", "linux")
    target = kind(Setting(honest=keys, admits=roster.admits))
    try:
        assert is_served(target)
        RosterFile(tmp_path / "roster.json").revoke("beta")
        time.sleep(1.0)
        before = target.num_heard()
        for _ in range(20):
            target.say()
            time.sleep(0.02)
        assert target.num_heard() == before
    finally:
        target.close()


def _member(target: Target) -> KeyPair:
    """Another one."""
    keys = new_key_pair()
    target.members.add(keys.public)
    return keys


def test_nobody_can_choose_a_name() -> None:
    """A routing id that the server gives can't be chosen, so that none is left that somebody else could take."""
    for kind in (DataEdge, Control):
        target: Target = kind()
        try:
            keys = _member(target)
            with dealer(target.endpoint, keys, target.keys.public, ROUTING_ID=CHOSEN) as sock:
                insist(sock, target.says, for_s=0.3)
                assert is_served(target)
                assert not sock.poll(0)
            assert not target.is_reached()
        finally:
            target.close()


def test_who_takes_the_name_of_a_member_of_a_piece_server_gets_nothing_of_it() -> None:
    target = Pieces()
    try:
        victim, thief = _member(target), _member(target)
        asks = encode_request(PieceRequest(1, "0" * 64, 0, 10))
        with dealer(target.endpoint, victim, target.keys.public, ROUTING_ID=CHOSEN) as owner:
            owner.send(asks)
            assert owner.poll(60_000) and len(owner.recv_multipart()) == 2
            with dealer(target.endpoint, thief, target.keys.public, ROUTING_ID=CHOSEN) as other:
                insist(other, target.says, for_s=0.3)
                owner.send(asks)
                assert owner.poll(60_000) and len(owner.recv_multipart()) == 2
                assert not other.poll(0)
        with dealer(target.endpoint, thief, target.keys.public, ROUTING_ID=CHOSEN) as other:
            assert not other.poll(300), "what the first one had asked for"
    finally:
        target.close()


def test_strangers_do_not_take_the_place_of_a_neighbour_that_is_still_to_come() -> None:
    def come_first(target: Target) -> None:
        for keys in (None, new_key_pair()):
            with dealer(target.endpoint, keys, target.keys.public) as sock:
                insist(sock, target.says, for_s=0.3)

    target = DataEdge(Setting(first=come_first))
    try:
        assert is_served(target)
        assert not target.is_reached()
    finally:
        target.close()


def test_on_an_edge_the_first_to_greet_is_the_only_one() -> None:
    target = DataEdge()
    try:
        with dealer(target.endpoint, _member(target), target.keys.public) as sock:
            insist(sock, target.says, for_s=0.3)
            assert is_served(target)
        assert is_served(target)  # Nor has the edge lost its peer when the other one went.
        assert not target.is_reached()
    finally:
        target.close()


def test_strangers_that_come_and_go_are_not_noticed_by_the_peer() -> None:
    """A question for each of them would fill its queue, which it never reads, in seconds: then its heartbeats stop."""
    target = DataEdge()
    try:
        for _ in range(50):
            with raw(target.endpoint):
                assert is_served(target)
        time.sleep(0.2)
        assert not target.is_sender_asked()
    finally:
        target.close()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_recorded_session_that_is_played_again(kind: Any) -> None:
    """To the socket that heard it while it lasts, and to a new one with the same keys."""
    with ExitStack() as stack:
        relays: list[RecordingRelay] = []

        def way(endpoint: str) -> str:
            relays.append(RecordingRelay(endpoint))
            stack.callback(relays[-1].close)
            return relays[-1].endpoint

        setting = Setting(way=way)
        target = kind(setting)
        stack.callback(target.close)
        assert all(is_served(target) for _ in range(5))
        recorded = bytes(relays[0].sent[0])
        assert len(recorded) > 800
        fresh = kind(Setting(keys=setting.keys, honest=setting.honest))
        stack.callback(fresh.close)
        time.sleep(0.2)
        for heard_it in (target, fresh):
            before = heard_it.num_heard()
            for pieces in ([recorded], [recorded[:64], recorded[64:266], recorded[266:]]):
                with raw(heard_it.endpoint) as connection:
                    for piece in pieces:
                        push(connection, piece)
                        time.sleep(0.05)
                    time.sleep(0.1)
            assert heard_it.num_heard() == before
            assert is_served(heard_it)


@pytest.mark.parametrize("announced", HUGE)
def test_sizes_that_nobody_could_hold(target: Target, announced: int) -> None:
    """Before the handshake, in it, and after it."""
    before = resident_bytes()
    for opening in (
        b"\xff" + (2**63 - 1).to_bytes(8, "big"),
        greeting(b"CURVE") + frame(b"\x05HELLO", 4, announced),
        greeting(b"CURVE") + frame(bytes(2**20), 0, announced),
        greeting(b"CURVE") + frame(bytes(2**20), 4, target.max_frame_bytes + 1),
        greeting(b"CURVE") + hello() + frame(bytes(2**20), 4, announced),
        greeting() + frame(bytes(2**20), 0, announced),
    ):
        with raw(target.endpoint) as connection:
            push(connection, opening)
            assert is_served(target)
    assert resident_bytes() - before < 16 * MIB


def test_a_member_with_frames_that_are_too_large_loses_its_connection(target: Target) -> None:
    if isinstance(target, Pieces):
        pytest.skip("tests/transport/pieces has it")
    for num_bytes in (target.max_frame_bytes + 1, 2**24):
        keys = _member(target)
        with dealer(target.endpoint, keys, target.keys.public) as sock:
            monitor = sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            sock.send(bytes(num_bytes))
            assert monitor.poll(60_000)
            monitor.close(0)
        assert is_served(target)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel does not say what has come by a connection")
@pytest.mark.parametrize(
    ("kind", "frame_bytes", "num_frames", "most_mib"),
    [
        (DataEdge, 50_000, 8000, 160),
        (Control, 50_000, 6000, 128),
        (Control, 0, 600_000, 40),
        (Pieces, 1000, 300_000, 128),
    ],
)
def test_a_message_without_end_costs_a_bounded_amount(
    kind: Any, frame_bytes: int, num_frames: int, most_mib: int
) -> None:
    """libzmq gives a message away when it is whole, and has no limit for the number of its frames."""
    target = kind()
    try:
        assert is_served(target)
        before = resident_bytes()
        endless = start_endless(target, _member(target), frame_bytes, num_frames)
        highest = before
        try:
            while endless.poll() is None:
                highest = max(highest, resident_bytes())
                assert is_served(target)
                time.sleep(0.01)
        finally:
            endless.kill()
        assert endless.wait() == CUT_OFF
        assert highest - before < most_mib * MIB
        assert not target.is_reached()
    finally:
        target.close()


@pytest.mark.parametrize("header", LYING, ids=range(len(LYING)))
def test_headers_that_announce_what_is_not_there(target: Target, header: bytes) -> None:
    """From a member: nothing is made room for."""
    before = resident_bytes()
    with dealer(target.endpoint, _member(target), target.keys.public) as sock:
        insist(sock, [[header], [*target.says[0], header], *target.says[1:]][:2], for_s=0.1)
        assert is_served(target)
    assert resident_bytes() - before < 16 * MIB
