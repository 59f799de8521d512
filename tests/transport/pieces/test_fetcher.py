"""Getting pieces from the pool: only what lacks, once, right, and whatever happens on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.transport.pieces_pool import SMALL, Behind, Host, Model, Pool, digest_of, sent_bytes, spoil
from transport.errors import DownloadFailed, NoSpace
from transport.messages.pieces import PART_BYTES, Piece
from transport.messages.pool import PieceHint, PiecePeer
from transport.pieces import fetch_plan
from transport.pieces.assignment import assign_pieces
from transport.pieces.client import fetch_small
from transport.pieces.fetcher import MAX_UNWRITTEN_BYTES
from transport.pieces.flow_control import MAX_WINDOW_BYTES
from transport.pieces.store import PieceStore
from transport.security.curve import new_key_pair


def test_what_is_there_is_not_asked_for_and_a_second_time_nothing_is(pool: Pool) -> None:
    head, other = pool.server("head", SMALL), pool.host("other", SMALL, [0, 2])
    told: list[tuple[int, int]] = []
    report = other.fetch(SMALL, [head.peer], progress=lambda done, total: told.append((done, total)))
    expected = sum(SMALL.pieces[index].num_bytes for index in (1, 3, 4))
    assert report.is_complete and other.has(SMALL)
    assert report.bytes_by_peer == {"head": expected} and sent_bytes(head) == expected
    assert told[-1] == (expected, expected)
    assert other.fetch(SMALL, [head.peer]).bytes_by_peer == {}
    assert sent_bytes(head) == expected


def test_only_the_pieces_that_are_needed_come_and_one_that_is_listed_twice_comes_once(pool: Pool) -> None:
    head, other = pool.server("head", SMALL), pool.host("other")
    twice = {**SMALL.some([1, 3]), 4: SMALL.pieces[3]}
    assert other.fetch(SMALL, [head.peer], pieces=twice).is_complete
    assert sent_bytes(head) == 1 + PART_BYTES
    assert other.has(SMALL, [1, 3]) and not other.store.has(SMALL.pieces[0].digest)


def test_a_disk_that_is_too_full_is_found_before_the_first_byte(pool: Pool, tmp_path: Path) -> None:
    head, other = pool.server("head", SMALL), pool.host("other")
    other.store = PieceStore(tmp_path / "small", limit_bytes=SMALL.num_bytes - 1)
    with pytest.raises(NoSpace):
        other.fetch(SMALL, [head.peer])
    assert sent_bytes(head) == 0


@pytest.mark.parametrize("seed", range(2))
def test_a_server_that_goes_and_comes_back_sends_nothing_twice(pool: Pool, large: Model, seed: int) -> None:
    head, other = pool.server("head", large), pool.host("other")
    draw = random.Random(seed)
    cuts = sorted(draw.sample(range(large.num_bytes), 3))
    num_cuts, sent = len(cuts), 0

    def progress(done: int, total: int) -> None:
        nonlocal sent
        if cuts and done >= cuts[0]:
            del cuts[0]
            assert head.server is not None
            head.server.close()
            sent += head.server.sent_bytes
            pool.serve(head, head.server.endpoint)

    assert other.fetch(large, [head.peer], progress=progress).is_complete
    assert other.has(large) and not cuts
    # What was on its way is lost.
    assert sent + sent_bytes(head) - large.num_bytes <= num_cuts * MAX_WINDOW_BYTES


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_fetch_that_was_killed_is_gone_on_with(pool: Pool, large: Model, tmp_path: Path, stack: ExitStack) -> None:
    head, other = pool.server("head", large), pool.host("other")
    draw = random.Random(2)
    marks = sorted(draw.sample(range(1_000_000, large.num_bytes), 2))
    for hold_at in marks:
        child = start_child(
            stack,
            "fetch",
            other,
            peer=head.keys.public,
            endpoint=head.peer.endpoint,
            model=large.digest,
            pieces=[[piece.digest, piece.num_bytes] for piece in large.pieces.values()],
            hold_at=hold_at,
        )
        assert int(child.stdout.readline()) >= hold_at
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    report = other.fetch(large, [head.peer])
    assert report.is_complete and other.has(large)
    assert sum(report.bytes_by_peer.values()) <= large.num_bytes - marks[-1]
    # What was on its way, or not on the disk yet.
    assert sent_bytes(head) - large.num_bytes <= len(marks) * (2 * MAX_WINDOW_BYTES + MAX_UNWRITTEN_BYTES)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.usefixtures("patient")
def test_when_a_server_is_killed_another_one_gives_the_rest(pool: Pool, large: Model, stack: ExitStack) -> None:
    first, second, other = pool.host("first", large), pool.host("second", large), pool.host("other")
    child = start_child(stack, "serve", first, peer=other.keys.public)
    peer = PiecePeer("first", child.stdout.readline().strip(), first.keys.public)
    has_begun = threading.Event()
    pool.serve(second, sources=[Behind(second.store, has_begun)])

    def progress(done: int, total: int) -> None:
        if done:
            has_begun.set()
        if done >= large.num_bytes // 3 and child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()

    report = other.fetch(large, [peer, second.peer], progress=progress)
    assert report.is_complete and other.has(large) and not report.refused_peers
    assert set(report.bytes_by_peer) == {"first", "second"}
    assert sum(report.bytes_by_peer.values()) == large.num_bytes


def start_child(stack: ExitStack, role: str, host: Host, **told: Any) -> Any:
    """With the host's keys and store."""
    told |= {"public": host.keys.public, "secret": host.keys.secret, "folder": str(host.store.root)}
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.support.transport.pieces_child", role, json.dumps(told)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    stack.callback(child.communicate)
    stack.callback(child.kill)
    return child


def test_who_can_not_be_reached_and_who_does_not_let_us_in_are_told_apart(pool: Pool) -> None:
    other = pool.host("other")
    strict = pool.server("strict", SMALL, admits=lambda key: False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = PiecePeer("nobody", f"tcp://127.0.0.1:{taken.getsockname()[1]}", new_key_pair().public)
    wrong_key = PiecePeer("wrong key", strict.peer.endpoint, new_key_pair().public)
    nonsense = PiecePeer("nonsense", "ipc:///tmp/x", new_key_pair().public)
    with pytest.raises(DownloadFailed) as failed:
        other.fetch(SMALL, [nobody, strict.peer, wrong_key, nonsense], patience_s=4.0)
    assert "strict: it does not let this host in" in failed.value.message
    assert "nobody: it was not reached" in failed.value.message
    assert "nonsense: refused" in failed.value.message


def test_who_is_revoked_in_the_middle_gets_no_more(pool: Pool, large: Model) -> None:
    head, other = pool.server("head", large), pool.host("other")

    def progress(done: int, total: int) -> None:
        if done > 5_000_000:
            pool.members.discard(other.keys.public)

    with pytest.raises(DownloadFailed, match="does not let this host in"):
        other.fetch(large, [head.peer], progress=progress, patience_s=2.5)
    assert sent_bytes(head) < large.num_bytes


def test_it_can_be_stopped_and_gone_on_with(pool: Pool, large: Model) -> None:
    head, other = pool.server("head", large), pool.host("other")
    told: list[int] = []
    report = other.fetch(
        large,
        [head.peer],
        progress=lambda done, total: told.append(done),
        stop=lambda: bool(told) and told[-1] > 5_000_000,
    )
    assert not report.is_complete
    rest = other.fetch(large, [head.peer])
    assert rest.is_complete and other.has(large)
    assert report.bytes_by_peer["head"] + rest.bytes_by_peer["head"] == large.num_bytes


@pytest.mark.usefixtures("patient")
def test_two_hosts_that_need_the_same_get_half_from_each_other(pool: Pool, large: Model) -> None:
    head = pool.server("head", large)
    hosts = [pool.server("a"), pool.server("b")]
    for host in hosts:
        host.store.put(large.list_bytes, large.digest)
    sizes = [piece.num_bytes for piece in large.pieces.values()]
    hints = assign_pieces({host.keys.public: list(large.pieces) for host in hosts}, sizes)
    with ThreadPoolExecutor() as threads:
        reports = [
            threads.submit(host.fetch, large, [peer.peer, head.peer], hints=hints[host.keys.public])
            for host, peer in zip(hosts, hosts[::-1], strict=True)
        ]
        found = [report.result() for report in reports]
    assert all(host.has(large) for host in hosts)
    assert sent_bytes(head) == large.num_bytes
    for report in found:
        assert len(report.bytes_by_peer) == 2
        assert report.bytes_by_peer["head"] < 0.7 * large.num_bytes


@pytest.mark.parametrize("state", ["away", "empty", "refusing"])
def test_a_hint_that_leads_nowhere_costs_time_and_no_more(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setattr(fetch_plan, "HINT_PATIENCE_S", 0.5)
    monkeypatch.setattr(fetch_plan, "AWAY_PATIENCE_S", 0.5)
    head, other = pool.server("head", SMALL), pool.host("other")
    hinted = pool.server("hinted", SMALL, [], admits=(lambda key: False) if state == "refusing" else None)
    peer = hinted.peer
    if state == "away":
        assert hinted.server is not None
        hinted.server.close()
    report = other.fetch(SMALL, [peer, head.peer], hints=[PieceHint(hinted.keys.public, 0, 2**40)])
    assert report.is_complete and other.has(SMALL)
    assert report.bytes_by_peer == {"head": SMALL.num_bytes}


def test_two_processes_of_a_host_do_not_get_the_same_twice(pool: Pool, large: Model) -> None:
    head, one = pool.server("head", large), pool.host("one")
    two = pool.host("two")
    two.store = PieceStore(one.store.root)
    with ThreadPoolExecutor() as threads:
        reports = [threads.submit(host.fetch, large, [head.peer]) for host in (one, two)]
        assert all(report.result().is_complete for report in reports)
    assert one.has(large)
    assert sent_bytes(head) == large.num_bytes


def whole(host: Host, digest: str, peers: Sequence[PiecePeer], max_bytes: int = 2**24) -> bytes:
    return fetch_small(
        digest, peers, max_bytes, curve=host.curve, context=host.context, what="the list of a model", patience_s=0.5
    )


def test_a_list_is_got_whole_and_checked(pool: Pool) -> None:
    contents = [b"a list", bytes(PART_BYTES), bytes(2 * PART_BYTES + 1)]
    head, liar, other = pool.server("head", SMALL), pool.server("liar"), pool.host("other")
    for content in contents:
        head.store.put(content, digest_of(content))
        liar.store.put(content, digest_of(content))
        spoil(liar, Piece(digest_of(content), len(content)))
        assert whole(other, digest_of(content), [head.peer]) == content
        assert whole(other, digest_of(content), [liar.peer, head.peer]) == content
        with pytest.raises(DownloadFailed, match=r"the list of a model.*liar: it sent wrong bytes"):
            whole(other, digest_of(content), [liar.peer])
    with pytest.raises(DownloadFailed, match=r"head: it has more than 1000 bytes"):
        whole(other, digest_of(contents[1]), [head.peer], max_bytes=1000)
    with pytest.raises(DownloadFailed, match="head: it does not have it"):
        whole(other, "0" * 64, [head.peer])
    with pytest.raises(DownloadFailed, match="no host offers it"):
        whole(other, "0" * 64, [])
