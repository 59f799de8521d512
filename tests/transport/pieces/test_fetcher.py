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
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.transport.pieces_pool import Host, Model, Pool, digest_of
from transport.errors import DownloadFailed, NoSpace
from transport.messages.pieces import MAX_PIECE_BYTES, PART_BYTES, Piece
from transport.messages.pool import PieceHint, PiecePeer
from transport.pieces import fetch_peer, fetch_plan, fetcher
from transport.pieces.assignment import assign_pieces
from transport.pieces.client import fetch_small
from transport.pieces.fetcher import MAX_UNWRITTEN_BYTES
from transport.pieces.flow_control import MAX_WINDOW_BYTES
from transport.pieces.piece_source import Located, StoreSource
from transport.pieces.store import PieceStore
from transport.security.curve import new_key_pair

SMALL = Model(3 * PART_BYTES + 5, 1, 1000, PART_BYTES, 2 * PART_BYTES)


@pytest.fixture(scope="module")
def large() -> Model:
    return Model(MAX_PIECE_BYTES, 100, 5_000_001, MAX_PIECE_BYTES, 8 * PART_BYTES, 3_000_000, seed=1)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool(tmp_path) as pool:
        yield pool


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gives up waiting for another one, or does its part, because a busy machine makes it slow."""
    for name in ("HINT_PATIENCE_S", "AWAY_PATIENCE_S", "ENDGAME_IDLE_S"):
        monkeypatch.setattr(fetch_plan, name, 120.0)
    for name in ("PEER_SILENT_S", "SLOW_AFTER_S"):
        monkeypatch.setattr(fetch_peer, name, 120.0)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def sent_bytes(*hosts: Host) -> int:
    return sum(host.server.sent_bytes for host in hosts if host.server is not None)


def spoil(host: Host, piece: Piece) -> None:
    """One bit."""
    path = host.store.path(piece.digest)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


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


class Asked(StoreSource):
    """Tells when it was asked for a piece first: only then is it known what it has."""

    def __init__(self, store: PieceStore) -> None:
        super().__init__(store)
        self.asked = threading.Event()
        self._lists: set[str] = set()

    def have_bitmap(self, model: str) -> bytes:
        self._lists.add(model)
        return super().have_bitmap(model)

    def locate(self, digest: str) -> Located | None:
        if digest not in self._lists:
            self.asked.set()
        return super().locate(digest)


class Behind(StoreSource):
    """Answers nothing until then: who connects sooner makes no difference."""

    def __init__(self, store: PieceStore, then: threading.Event) -> None:
        super().__init__(store)
        self._then = then

    def locate(self, digest: str) -> Located | None:
        assert self._then.wait(120.0)
        return super().locate(digest)


@pytest.mark.usefixtures("patient")
def test_who_sends_wrong_bytes_is_refused_by_name_and_another_is_used(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    liar, head, other = pool.host("liar", SMALL), pool.host("head", SMALL), pool.host("other")
    for piece in SMALL.pieces.values():
        spoil(liar, piece)
    lies = Asked(liar.store)
    pool.serve(liar, sources=[lies])
    pool.serve(head, sources=[Behind(head.store, lies.asked)])
    report = other.fetch(SMALL, [liar.peer, head.peer])
    assert report.is_complete and other.has(SMALL)
    assert list(report.refused_peers) == ["liar"] and "wrong bytes" in report.refused_peers["liar"]
    assert "liar" in caplog.text


def test_if_everybody_sends_wrong_bytes_the_error_names_them(pool: Pool) -> None:
    liars, other = [pool.server(name, SMALL) for name in ("one", "two")], pool.host("other")
    for liar in liars:
        spoil(liar, SMALL.pieces[3])
    with pytest.raises(DownloadFailed, match=r"model random.*one: refused.*wrong bytes.*two: refused.*wrong bytes"):
        other.fetch(SMALL, [liar.peer for liar in liars])
    assert not other.store.has(SMALL.pieces[3].digest)


def test_a_piece_that_the_disk_has_lost_a_part_of_comes_again(pool: Pool) -> None:
    head, other = pool.server("head", SMALL), pool.host("other", SMALL)
    other.store.path(SMALL.pieces[4].digest).write_bytes(b"")
    report = other.fetch(SMALL, [head.peer])
    assert report.bytes_by_peer == {"head": SMALL.pieces[4].num_bytes} and other.has(SMALL)


def test_nobody_is_blamed_for_what_an_earlier_fetch_has_left(pool: Pool) -> None:
    head, other = pool.server("head", SMALL), pool.host("other")
    partial = other.store.open_partial(SMALL.pieces[0])
    assert partial is not None
    partial.write(bytes(1000))
    partial.close()
    report = other.fetch(SMALL, [head.peer])
    assert report.is_complete and other.has(SMALL) and not report.refused_peers


@pytest.mark.usefixtures("patient")
def test_a_short_or_misplaced_part_refuses_the_peer(pool: Pool, tmp_path: Path) -> None:
    class Short(Asked):
        def locate(self, digest: str) -> Located | None:
            found = super().locate(digest)
            return found and found._replace(num_bytes=found.num_bytes - 1)

    head, other = pool.host("head", SMALL), pool.host("other")
    lies = Short(PieceStore(head.store.root))
    short = pool.server("short", sources=[lies])
    pool.serve(head, sources=[Behind(head.store, lies.asked)])
    report = other.fetch(SMALL, [short.peer, head.peer])
    assert report.is_complete and other.has(SMALL)
    assert "bytes where" in report.refused_peers["short"]


class Stuck(StoreSource):
    """Answers the first requests only."""

    def __init__(self, store: PieceStore, num_answers: int) -> None:
        super().__init__(store)
        self.left = num_answers
        self.over = threading.Event()

    def locate(self, digest: str) -> Located | None:
        self.left -= 1
        if self.left < 0:
            self.over.wait(120.0)
        return super().locate(digest)


def test_a_silent_peer_is_left(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_peer, "PEER_SILENT_S", 0.5)
    stuck = pool.host("stuck", SMALL)
    source = Stuck(stuck.store, 4)
    pool.serve(stuck, sources=[source])
    head, other = pool.server("head", SMALL), pool.host("other")
    report = other.fetch(SMALL, [stuck.peer, head.peer])
    source.over.set()
    assert report.is_complete and other.has(SMALL) and not report.refused_peers
    assert report.bytes_by_peer["head"]


def test_one_that_never_says_what_it_has_is_left_and_named(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_peer, "PEER_SILENT_S", 0.5)
    monkeypatch.setattr(fetch_peer, "HAVE_INTERVAL_S", 0.1)
    mute = pool.host("mute", SMALL)
    source = Stuck(mute.store, 0)
    pool.serve(mute, sources=[source])
    with pytest.raises(DownloadFailed, match="mute: it was silent for"):
        pool.host("other").fetch(SMALL, [mute.peer], patience_s=1.5)
    source.over.set()


class Slow(Asked):
    """Takes its time for each part of a piece."""

    def locate(self, digest: str) -> Located | None:
        found = super().locate(digest)
        if digest not in self._lists:
            time.sleep(0.25)
        return found


def test_a_slow_peer_holds_nothing_up(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it would take 24 s, and for a piece 4 s."""
    monkeypatch.setattr(fetch_plan, "ENDGAME_IDLE_S", 0.5)
    monkeypatch.setattr(fetch_peer, "SLOW_AFTER_S", 0.5)
    model = Model(*[16 * PART_BYTES] * 6)
    slow = pool.host("slow", model)
    source = Slow(slow.store)
    pool.serve(slow, sources=[source])
    head, other = pool.host("head", model), pool.host("other")
    pool.serve(head, sources=[Behind(head.store, source.asked)])
    report = other.fetch(model, [slow.peer, head.peer])
    assert report.is_complete and other.has(model) and not report.refused_peers
    assert report.bytes_by_peer["slow"] < 16 * PART_BYTES
    assert sent_bytes(slow, head) < model.num_bytes + 2 * MAX_WINDOW_BYTES


def test_what_a_peer_lacks_another_one_gives(pool: Pool) -> None:
    some, rest, other = pool.server("some", SMALL, [0, 1]), pool.server("rest", SMALL, [1, 2, 3, 4]), pool.host("other")
    gone = pool.server("gone", SMALL)
    for index in range(4):
        gone.store.path(SMALL.pieces[index].digest).unlink()
    report = other.fetch(SMALL, [gone.peer, some.peer, rest.peer])
    assert report.is_complete and other.has(SMALL) and not report.refused_peers
    assert report.bytes_by_peer["some"] >= SMALL.pieces[0].num_bytes


def test_a_piece_that_nobody_has_is_an_error_with_what_was_tried(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher, "FETCH_UNAVAILABLE_S", 1.5)
    head, other = pool.server("head", SMALL, [0, 1, 2, 3]), pool.host("other")
    with pytest.raises(DownloadFailed, match=r"model random.*no host has piece.*head: it does not have") as failed:
        other.fetch(SMALL, [head.peer])
    assert failed.value.hint
    assert other.has(SMALL, [0, 1, 2, 3])
    with pytest.raises(DownloadFailed, match="no other host offers it"):
        other.fetch(SMALL, [])


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
