"""Leases, eviction, the limit and a full disk: what is used stays, and what can not fit is told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.needs import NEEDS_ROOT, NO_MOUNTS, is_root
from tests.support.transport.stored_pieces import fill, noise, piece_of, start
from transport.errors import NoSpace, PotluckError
from transport.messages.pieces import MAX_PIECE_BYTES
from transport.pieces.disk_space import MARGIN_BYTES, read_limit, write_limit
from transport.pieces.store import PieceStore

MB = 10**6


def test_what_was_not_used_for_longest_goes_first_and_leased_pieces_never(tmp_path: Path) -> None:
    store = PieceStore(tmp_path, limit_bytes=5000)
    pieces = fill(store, *(noise(1000, number) for number in range(5)))
    for age, piece in enumerate(pieces):
        os.utime(store.path(piece.digest), ns=(age, age))
    with store.lease(pieces[:1]):
        with store.lease(pieces[1:2]):
            pass  # Used just now.
        os.utime(store.path(pieces[0].digest), ns=(0, 0))
        store.require_space(2000)
        assert [store.has(piece.digest) for piece in pieces] == [True, True, False, False, True]
        with pytest.raises(NoSpace, match="may take") as raised:
            store.require_space(4001)
        assert "--limit" in raised.value.hint
        assert store.has(pieces[4].digest), "in vain, nothing is evicted"
        assert store.clear() == 2000
        assert store.has(pieces[0].digest)
    assert store.clear() == 1000


def test_a_lease_of_another_process_counts(store: PieceStore) -> None:
    script = """
import sys
from pathlib import Path
from transport.messages.pieces import Piece
from transport.pieces.store import PieceStore
lease = PieceStore(Path(sys.argv[1])).lease([Piece(sys.argv[2], int(sys.argv[3]))])
print("ready", flush=True)
sys.stdin.readline()
"""
    (piece,) = fill(store, noise(1000))
    process = start(script, str(store.root), piece.digest, str(piece.num_bytes))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert store.clear() == 0
    process.communicate("end\n", timeout=400)
    assert store.clear() == 1000


def test_what_other_leases_still_lack_is_not_given_away(tmp_path: Path) -> None:
    store = PieceStore(tmp_path, limit_bytes=10_000)
    coming, mine = piece_of(noise(6000)), piece_of(noise(5000, 1))
    with store.lease([coming]):
        store.require_space(4000)
        with store.lease([mine]), pytest.raises(NoSpace):
            store.require_space(5000)
    with store.lease([mine]):
        store.require_space(5000)


def test_partial_pieces_are_evicted_unless_they_are_coming_in(store: PieceStore) -> None:
    idle, busy = piece_of(noise(500)), piece_of(noise(500, 1))
    for piece in (idle, busy):
        partial = store.open_partial(piece)
        assert partial is not None
        partial.write(noise(500, 0 if piece is idle else 1)[:100])
        if piece is idle:
            partial.close()
    assert store.clear() == 100
    assert (store.partial_bytes(idle), store.partial_bytes(busy)) == (0, 100)


def test_the_limit_is_a_setting_of_the_store(store: PieceStore) -> None:
    assert store.limit_bytes is None
    pieces = fill(store, *(noise(1000, number) for number in range(4)))
    write_limit(store.root, 2500)
    assert PieceStore(store.root).limit_bytes == 2500 == read_limit(store.root)
    assert store.trim() == 2000
    assert sum(store.has(piece.digest) for piece in pieces) == 2
    write_limit(store.root, None)
    assert (store.limit_bytes, store.trim()) == (None, 0)
    (store.root / "limit.json").write_text("{")
    with pytest.raises(PotluckError, match=r"limit\.json"):
        _ = store.limit_bytes


def test_a_transfer_that_can_not_fit_is_refused_before_it_begins(store: PieceStore) -> None:
    with pytest.raises(NoSpace, match="MB free") as raised:
        store.require_space(1 << 60)
    assert "potluck cache" in raised.value.hint
    assert "POTLUCK_HOME" in raised.value.hint


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """64 MB of its own."""
    if sys.platform != "linux" or not is_root():
        pytest.skip(NEEDS_ROOT)
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "potluck", str(folder)], check=False).returncode:
        pytest.skip(NO_MOUNTS)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_is_told_and_what_came_stays(small_disk: Path) -> None:
    store = PieceStore(small_disk / "pieces")
    (kept,) = fill(store, noise(8 * MB))
    with pytest.raises(NoSpace), store.lease([kept]):
        store.require_space(30 * MB)
    store.require_space(30 * MB)
    assert not store.has(kept.digest), "what nobody uses makes room"
    store.require_space(20 * MB)
    (small_disk / "other").write_bytes(bytes(56 * MB))
    data = noise(MAX_PIECE_BYTES)
    partial = store.open_partial(piece_of(data))
    assert partial is not None
    with pytest.raises(NoSpace, match="filled up"):
        partial.write(data)
    came = partial.num_bytes
    partial.close()
    assert 0 < came < len(data)
    (small_disk / "other").unlink()
    assert store.partial_bytes(piece_of(data)) == came
    partial = store.open_partial(piece_of(data))
    assert partial is not None
    assert partial.num_bytes == came
    partial.write(data[came:])
    partial.commit()
    assert store.path(piece_of(data).digest).read_bytes() == data
    assert len(data) + MARGIN_BYTES < 64 << 20
