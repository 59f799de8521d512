"""What the other hosts of a pool are told, whatever its head is busy with."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq

from devices.hardware.interfaces import leads_to_lan
from devices.pairing.identity import load_keys
from devices.pairing.roster import RosterFile
from potluck.head import hosts, pool
from potluck.host.member import _stop_error
from potluck.host.piece_server import _MAX_CONCURRENT_REQUESTS, HostModelService
from tests.support.doctor.small_head import SmallHead
from tests.support.transport.introductions import ARRIVE, REGISTER, wait_until
from transport.control import ControlClient
from transport.errors import NotAllowed, RingDown
from transport.messages.control import Stop
from transport.messages.pool import HostFault, ListHostModels, MembersChanged, NodeAccepted
from transport.security.curve import Curve, new_key_pair


def test_hosts_learn_within_a_second_who_is_no_member_any_more(tmp_path: Path) -> None:
    """Also of one that is not there itself, and while nobody but control looks, as when a ring loads: whoever has its
    key could else go on taking pieces of models from them."""
    guest, stolen = load_keys(tmp_path / "guest" / "identity"), new_key_pair()
    heard: list[Any] = []
    with ExitStack() as stack:
        head = SmallHead(tmp_path / "head", "127.0.0.1")
        stack.callback(head.close)
        head.pair(tmp_path / "guest")
        head.roster.add(stolen.public, "laptop", "macOS")
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(context.destroy, 0)
        curve = Curve(context, guest)
        client = ControlClient(
            context,
            str(head.pool.control),
            ARRIVE,
            on_message=heard.append,
            on_lost=lambda: heard.append("lost"),
            prepare=curve.client_auth(head.key),
        )
        stack.callback(client.close)
        wait_until(lambda: any(isinstance(message, NodeAccepted) for message in heard))
        before = len(heard)
        RosterFile(head.roster.path).revoke("laptop")
        revoked = time.monotonic()
        wait_until(lambda: len(heard) > before)
        took_s = time.monotonic() - revoked
    told = heard[-1]
    assert isinstance(told, MembersChanged)
    assert guest.public in told.members and stolen.public not in told.members
    assert took_s < 1.0


@pytest.mark.parametrize(
    ("address", "comes_from", "may"),
    [
        ("192.168.1.7", "192.168.1.7", True),
        ("127.0.0.2", "127.0.0.1", True),
        ("127.0.0.1", "192.168.1.7", False),
        ("127.0.0.1", "", False),
        ("10.8.0.9", "192.168.1.7", False),
        ("192.168.2.7", "192.168.1.7", True),
    ],
)
def test_a_device_does_not_look_around_by_the_heads_eyes(
    address: str, comes_from: str, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the head's VPN is 10.8.0.0/16; at home are 192.168.1.0/24 and 192.168.2.0/24."""
    monkeypatch.setattr(hosts, "leads_to_lan", lambda address: address.startswith("192.168."))
    assert hosts._may_belong_to_peer(address, comes_from) is may


@pytest.mark.parametrize(
    "lie",
    [
        {"free_bytes": -1},
        {"total_bytes": -1},
        {"free_bytes": 2**80, "total_bytes": 2**80},
        {"bandwidth_bytes_per_s": float("nan")},
        {"bandwidth_bytes_per_s": float("inf")},
        {"bandwidth_bytes_per_s": 0.0},
        {"threads": 0},
        {"kind": "x" * 5000},
    ],
    ids=lambda lie: "-".join(lie),
)
def test_a_device_whose_numbers_are_none_is_no_part_of_any_plan(lie: dict[str, Any]) -> None:
    assert pool._is_plausible(REGISTER)
    assert not pool._is_plausible(msgspec.structs.replace(REGISTER, **lie))


def test_a_head_that_asks_for_too_much_at_once_is_told_so() -> None:
    """A request that nobody answers would keep the head waiting until it takes the host for silent."""
    go_on, replies = threading.Event(), queue.SimpleQueue[Any]()
    store: Any = SimpleNamespace(list=lambda: go_on.wait(10.0) and [])
    piece_server: Any = None
    service = HostModelService(store, piece_server, say=lambda line: None)
    for token in range(1, _MAX_CONCURRENT_REQUESTS + 2):
        service.on_request(ListHostModels(token=token), replies.put)
    refused = replies.get(timeout=5.0)
    assert isinstance(refused, HostFault)
    assert (refused.error.code, refused.token) == ("busy", _MAX_CONCURRENT_REQUESTS + 1)
    go_on.set()
    answered = [replies.get(timeout=5.0) for _ in range(_MAX_CONCURRENT_REQUESTS)]
    assert {answer.token for answer in answered} == set(range(1, _MAX_CONCURRENT_REQUESTS + 1))


def test_loopback_is_no_lan() -> None:
    assert not leads_to_lan("127.0.0.1")


@pytest.mark.parametrize("is_revoked", [True, False])
def test_a_list_that_can_not_be_read_keeps_hosts_out_and_is_not_called_a_revocation(
    tmp_path: Path, is_revoked: bool
) -> None:
    """One that is revoked ends; the others come back by themselves once someone has put the list right."""
    heard: list[Any] = []
    guest = load_keys(tmp_path / "guest" / "identity")
    with ExitStack() as stack:
        head = SmallHead(tmp_path / "head", "127.0.0.1")
        stack.callback(head.close)
        head.pair(tmp_path / "guest")
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(context.destroy, 0)
        client = ControlClient(
            context,
            str(head.pool.control),
            ARRIVE,
            on_message=heard.append,
            on_lost=lambda: None,
            prepare=Curve(context, guest).client_auth(head.key),
        )
        stack.callback(client.close)
        wait_until(lambda: any(isinstance(message, NodeAccepted) for message in heard))
        if is_revoked:
            RosterFile(head.roster.path).revoke("beta")
        else:
            head.roster.path.write_text("{")
        wait_until(lambda: any(isinstance(message, Stop) for message in heard))
        wait_until(lambda: head.pool.hosts.connected() == [])
    [stop] = [message for message in heard if isinstance(message, Stop)]
    assert isinstance(_stop_error(stop.reason), NotAllowed if is_revoked else RingDown)
    assert ("revoked" in stop.reason) is is_revoked
