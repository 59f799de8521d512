"""A piece server and who talks to it: members, some of them hostile, and strangers. Real sockets, CURVE, loopback."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, suppress
from typing import Any

import psutil
import pytest
import zmq

from tests.support.transport.pieces_pool import Host, Model, Pool
from transport.errors import DeadlineExceeded, NotAllowed
from transport.links.zmq_link import set_bulk_options
from transport.messages.pieces import (
    MAX_REPLY_FRAME_BYTES,
    PART_BYTES,
    HaveList,
    HaveRequest,
    PieceMissing,
    PiecePart,
    PieceRefused,
    PieceRequest,
    PieceServerReply,
    SpeedTest,
    decode_reply,
    encode,
    has_piece,
)
from transport.pieces import client as speed
from transport.pieces.client import measure_link_speed
from transport.pieces.piece_source import Located, StoreSource
from transport.pieces.server import MAX_CONNECTIONS_PER_KEY, MAX_PENDING
from transport.security.curve import Curve, KeyPair, new_key_pair

MODEL = Model(3 * PART_BYTES, 1000)
WITHIN_MS = 60_000
PATHS = ("../../etc/passwd", "/etc/passwd", "", "a" * 63 + "/", MODEL.pieces[0].digest.upper())


class Client:
    """A bare DEALER. Without `keys` it speaks no CURVE."""

    def __init__(self, stack: ExitStack, server: Host, keys: KeyPair | None, **options: Any) -> None:
        context: Any = zmq.Context()
        stack.callback(context.destroy, 0)
        self.socket = context.socket(zmq.DEALER)
        set_bulk_options(self.socket, max_message_bytes=MAX_REPLY_FRAME_BYTES)
        for option, value in options.items():
            self.socket.set(getattr(zmq, option), value)
        if keys is not None:
            Curve(context, keys).client_auth(server.keys.public)(self.socket)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        assert server.server is not None
        self.socket.connect(server.server.endpoint)

    def say(self, *frames: bytes) -> None:
        assert self.socket.poll(WITHIN_MS, zmq.POLLOUT)
        self.socket.send_multipart(frames)

    def hear(self) -> tuple[PieceServerReply, bytes]:
        assert self.socket.poll(WITHIN_MS), "no answer"
        frames = self.socket.recv_multipart()
        return decode_reply(frames), frames[1] if len(frames) == 2 else b""

    def ask(self, digest: str, offset: int = 0, num_bytes: int = PART_BYTES) -> tuple[PieceServerReply, bytes]:
        self.say(encode(PieceRequest(7, digest, offset, num_bytes)))
        return self.hear()

    def is_served(self) -> bool:
        return self.ask(MODEL.pieces[1].digest) == (PiecePart(7, MODEL.pieces[1].digest, 0), MODEL.contents[1])


def member(stack: ExitStack, pool: Pool, server: Host, **options: Any) -> Client:
    keys = new_key_pair()
    pool.members.add(keys.public)
    return Client(stack, server, keys, **options)


def test_a_member_gets_what_is_in_a_piece_and_no_more_than_that(pool: Pool, stack: ExitStack) -> None:
    client = member(stack, pool, pool.server("head", MODEL))
    digest, content = MODEL.pieces[0].digest, MODEL.contents[0]
    assert client.ask(digest, 5, 10) == (PiecePart(7, digest, 5), content[5:15])
    assert client.ask(digest, len(content) - 3) == (PiecePart(7, digest, len(content) - 3), content[-3:])
    assert client.ask(digest, len(content)) == (PiecePart(7, digest, len(content)), b"")
    assert client.ask("0" * 64) == (PieceMissing(7, "0" * 64), b"")


def test_a_server_says_what_it_holds(pool: Pool, stack: ExitStack) -> None:
    client = member(stack, pool, pool.server("head", MODEL, [1]))
    client.say(encode(HaveRequest(3, MODEL.digest)))
    answer, _ = client.hear()
    assert isinstance(answer, HaveList)
    assert [has_piece(answer.bitmap, index) for index in range(3)] == [False, True, False]
    for unknown in ("0" * 64, MODEL.pieces[1].digest):
        client.say(encode(HaveRequest(4, unknown)))
        assert client.hear() == (HaveList(4, b""), b"")


def test_a_piece_whose_file_has_become_shorter_is_missing(pool: Pool, stack: ExitStack) -> None:
    class Stale(StoreSource):
        def locate(self, digest: str) -> Located | None:
            found = super().locate(digest)
            return found and found._replace(num_bytes=found.num_bytes + 10)

    server = pool.host("head", MODEL)
    pool.serve(server, sources=[Stale(server.store)])
    client = member(stack, pool, server)
    digest = MODEL.pieces[1].digest
    assert client.ask(digest) == (PieceMissing(7, digest), b"")
    server.store.path(digest).unlink()
    assert client.ask(digest) == (PieceMissing(7, digest), b"")


def test_links_can_be_measured(pool: Pool) -> None:
    head, other = pool.server("head"), pool.host("other")
    assert measure_link_speed(head.peer, other.curve, other.context, num_bytes=2**21) > 1e4


def test_a_link_that_can_not_be_measured_says_why(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    head, other = pool.server("head"), pool.host("other")
    pool.members.discard(other.keys.public)
    monkeypatch.setattr(speed, "PEER_SILENT_S", 60.0)
    with pytest.raises(NotAllowed, match="head: it does not let this host in"):
        measure_link_speed(head.peer, other.curve, other.context)
    monkeypatch.setattr(speed, "PEER_SILENT_S", 0.3)
    assert head.server is not None
    head.server.close()
    with pytest.raises(DeadlineExceeded, match="nobody answers"):
        measure_link_speed(head.peer, other.curve, other.context)


@pytest.mark.parametrize("digest", PATHS)
def test_what_is_no_digest_opens_nothing(pool: Pool, stack: ExitStack, digest: str) -> None:
    server = pool.server("head", MODEL)
    client = member(stack, pool, server)
    answer, _ = client.ask(digest)
    assert isinstance(answer, PieceRefused)
    client.say(encode(PieceRequest(7, MODEL.pieces[1].digest, 0, 1)))
    assert not client.socket.poll(100), "who breaks the rules gets nothing more"
    assert member(stack, pool, server).is_served()


def test_strangers_and_those_without_encryption_get_nothing(pool: Pool, stack: ExitStack) -> None:
    server = pool.server("head", MODEL)
    strangers = [Client(stack, server, new_key_pair()), Client(stack, server, None, IMMEDIATE=0)]
    for stranger in strangers:
        stranger.socket.setsockopt(zmq.SNDTIMEO, 100)
        for _ in range(3):
            try:
                stranger.socket.send(encode(PieceRequest(7, MODEL.pieces[1].digest, 0, 1)))
            except zmq.Again:
                break  # It never gets a connection.
    assert member(stack, pool, server).is_served()
    assert not any(stranger.socket.poll(200) for stranger in strangers)
    assert server.server is not None and server.server.sent_bytes == len(MODEL.contents[1])


def test_garbage_and_frames_that_are_too_large_harm_nobody_else(pool: Pool, stack: ExitStack) -> None:
    server = pool.server("head", MODEL)
    for frames in ([b"garbage"], [b""], [b"a"] * 50, [bytes(2000)], [bytes(2**20)]):
        client = member(stack, pool, server)
        client.say(*frames)
        # A frame beyond the limit ends the connection; all else is answered once.
        ready = dict(zmq.zmq_poll([(client.socket, zmq.POLLIN), (client.monitor, zmq.POLLIN)], WITHIN_MS))
        assert ready
        if client.socket in ready:
            assert isinstance(client.hear()[0], PieceRefused)
    assert member(stack, pool, server).is_served()


def test_a_member_that_asks_for_much_and_takes_nothing_costs_little(pool: Pool, stack: ExitStack) -> None:
    server = pool.server("head", MODEL)
    assert member(stack, pool, server).is_served()
    before = psutil.Process().memory_info().rss
    ask = encode(PieceRequest(7, MODEL.pieces[0].digest, 0, PART_BYTES))
    # Small buffers: this process holds the other end too.
    within_the_rules = member(stack, pool, server, RCVHWM=1, RCVBUF=2**16)
    for _ in range(MAX_PENDING):
        within_the_rules.say(ask)
    beyond = member(stack, pool, server, RCVHWM=1, RCVBUF=2**16)
    for _ in range(10_000):
        try:
            beyond.socket.send(ask, zmq.DONTWAIT)
        except zmq.Again:
            time.sleep(0.001)
    assert member(stack, pool, server).is_served()
    assert psutil.Process().memory_info().rss - before < 8 * 2**20
    # Who then takes it gets all of it.
    assert [within_the_rules.hear()[1] for _ in range(MAX_PENDING)] == [MODEL.contents[0][:PART_BYTES]] * MAX_PENDING


def test_a_host_can_not_open_as_many_connections_as_it_likes(pool: Pool, stack: ExitStack) -> None:
    server, keys = pool.server("head", MODEL), new_key_pair()
    pool.members.add(keys.public)
    clients = [Client(stack, server, keys) for _ in range(MAX_CONNECTIONS_PER_KEY)]
    assert all(client.is_served() for client in clients)
    one_more = Client(stack, server, keys)
    one_more.say(encode(PieceRequest(7, MODEL.pieces[1].digest, 0, 1)))
    assert one_more.monitor.poll(WITHIN_MS), "it was not ended"
    assert all(client.is_served() for client in clients)


def test_who_is_revoked_gets_no_more_also_in_the_middle(pool: Pool, stack: ExitStack) -> None:
    server, keys = pool.server("head", MODEL), new_key_pair()
    pool.members.add(keys.public)
    client = Client(stack, server, keys, RCVHWM=2, RCVBUF=2**16)
    client.say(encode(SpeedTest(1, 64 * 2**20)))
    came = sum(len(client.hear()[1]) for _ in range(8))
    pool.members.remove(keys.public)
    assert server.server is not None
    while not client.monitor.poll(0):
        if client.socket.poll(50):
            came += len(client.hear()[1])
    assert came < 8 * 2**20
    sent = server.server.sent_bytes
    # It comes back at once, and is not let in.
    client.socket.setsockopt(zmq.SNDTIMEO, 500)
    with pytest.raises(zmq.Again):
        client.socket.send(encode(SpeedTest(1, 64 * 2**20)))
    assert server.server.sent_bytes == sent


def test_an_idle_member_that_is_revoked_is_cut_off_too(pool: Pool, stack: ExitStack) -> None:
    server, keys = pool.server("head", MODEL), new_key_pair()
    pool.members.add(keys.public)
    client, other = Client(stack, server, keys), member(stack, pool, server)
    assert client.is_served() and other.is_served()
    pool.members.remove(keys.public)
    assert client.monitor.poll(WITHIN_MS)
    assert other.is_served() and not other.monitor.poll(0)


def test_a_routing_id_can_not_be_taken_over(pool: Pool, stack: ExitStack) -> None:
    server = pool.server("head", MODEL)
    owner = member(stack, pool, server, ROUTING_ID=b"the-same")
    assert owner.is_served()
    thief = member(stack, pool, server, ROUTING_ID=b"the-same")
    thief.socket.setsockopt(zmq.SNDTIMEO, 500)
    with suppress(zmq.Again):
        thief.socket.send(encode(PieceRequest(7, MODEL.pieces[0].digest, 0, 1)))
    for _ in range(20):
        assert owner.is_served()
    assert not thief.socket.poll(0)


def test_a_server_that_is_closed_leaves_its_port_and_no_threads(pool: Pool, stack: ExitStack) -> None:
    server = pool.server("head", MODEL)
    assert member(stack, pool, server).is_served()
    assert server.server is not None
    server.server.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name == "pieces"]
    pool.serve(server, server.server.endpoint)
    assert member(stack, pool, server).is_served()
