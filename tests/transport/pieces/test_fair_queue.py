"""Whose turn it is at a piece server."""

from __future__ import annotations

from transport.messages.pieces import PieceRequest
from transport.pieces.server import MAX_PENDING, FairQueue, PeerConnection, TcpConnection

ASK = PieceRequest(1, "0" * 64, 0, 1)


def peers_with(**num_asks: int) -> FairQueue:
    peers = FairQueue()
    for name, count in num_asks.items():
        peer = PeerConnection(name.encode(), name, TcpConnection(-1, ()))
        peers.add(peer)
        for _ in range(count):
            assert peers.enqueue(peer, ASK)
    return peers


def served(peers: FairQueue, now_s: float = 0.0) -> str:
    """Everything that waits, one answer each a round."""
    found = ""
    while turn := peers.next_round(now_s):
        for peer in turn:
            peer.pending.popleft()
            found += peer.key
    return found


def test_each_gets_one_answer_in_turn_however_much_the_others_want() -> None:
    order = served(peers_with(a=20, b=2, c=3))
    assert sorted(order[:3]) == ["a", "b", "c"] and sorted(order[3:6]) == ["a", "b", "c"]
    assert sorted(order[6:8]) == ["a", "c"]
    assert order.count("a") == 20


def test_not_always_the_same_one_comes_first() -> None:
    peers = peers_with(a=20, b=20)
    firsts = []
    for _ in range(4):
        turn = peers.next_round(0.0)
        firsts.append(turn[0].key)
        for peer in turn:
            peer.pending.popleft()
    assert firsts == ["a", "b", "a", "b"]


def test_who_takes_nothing_is_tried_more_and_more_rarely_and_holds_up_nobody() -> None:
    peers = peers_with(a=5, b=1)
    slow = peers.all()[0]
    tries, now_s = 0, 0.0
    while now_s < 1.0:
        for peer in peers.next_round(now_s):
            if peer is slow:
                tries += 1
                peer.note_blocked(now_s)
            else:
                peer.pending.popleft()
        now_s += max(0.0005, peers.wait_s(now_s, 0.25))
    assert 20 <= tries <= 40
    slow.note_sent()
    assert peers.wait_s(now_s, 0.25) == 0.0
    assert served(peers, now_s) == "a" * 5
    assert peers.wait_s(now_s, 0.25) == 0.25


def test_only_so_many_requests_wait() -> None:
    peers = peers_with(a=MAX_PENDING)
    assert not peers.enqueue(peers.all()[0], ASK)


def test_what_a_peer_had_asked_is_forgotten_with_it_also_for_the_next_with_its_id() -> None:
    peers = peers_with(a=3)
    peers.remove(peers.all()[0])
    assert served(peers) == "" and len(peers) == 0
    peers = peers_with(a=3)
    peers.add(PeerConnection(b"a", "thief", TcpConnection(-1, ())))
    assert served(peers) == ""
