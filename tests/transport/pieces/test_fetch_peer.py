"""A peer that sends wrong bytes, none, or slowly: it is refused or left, and another one gives what lacks."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tests.support.transport.pieces_pool import SMALL, Behind, Model, Pool, sent_bytes, spoil
from transport.errors import DownloadFailed
from transport.messages.pieces import PART_BYTES
from transport.pieces import fetch_peer, fetch_plan, fetcher
from transport.pieces.flow_control import MAX_WINDOW_BYTES
from transport.pieces.piece_source import Located, StoreSource
from transport.pieces.store import PieceStore


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
