"""The store of pieces: whatever is killed, filled or sent wrongly, what it holds under a hash has that hash."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.errors import BadMessage, NoSpace, PotluckError, WrongBytes
from transport.messages.pieces import MAX_PIECE_BYTES, Piece
from transport.pieces import locks
from transport.pieces.disk_space import MARGIN_BYTES, read_limit, write_limit
from transport.pieces.store import PieceStore

MB = 10**6


def piece_of(data: bytes) -> Piece:
    return Piece(hashlib.sha256(data).hexdigest(), len(data))


def noise(num_bytes: int, seed: int = 0) -> bytes:
    return hashlib.shake_128(seed.to_bytes(4, "little")).digest(num_bytes)


def fill(store: PieceStore, *contents: bytes) -> list[Piece]:
    pieces = [piece_of(data) for data in contents]
    for piece, data in zip(pieces, contents, strict=True):
        store.put(data, piece.digest)
    return pieces


@pytest.fixture
def store(tmp_path: Path) -> PieceStore:
    return PieceStore(tmp_path / "pieces")


def test_a_piece_comes_in_parts_and_is_found_under_its_hash(store: PieceStore) -> None:
    data = noise(100_000)
    piece = piece_of(data)
    assert not store.has(piece.digest)
    partial = store.open_partial(piece)
    assert partial is not None
    partial.write(data[:70_000])
    assert not store.has(piece.digest)
    partial.write(memoryview(data)[70_000:])
    partial.commit()
    partial.close()
    assert store.has(piece.digest)
    assert store.path(piece.digest).read_bytes() == data
    assert store.open_partial(piece) is None
    assert store.partial_bytes(piece) == piece.num_bytes == store.used_bytes()
    assert {path.suffix for path in store.root.rglob("*") if path.is_file()} == {".piece"}


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 5000),
    steps=st.lists(st.one_of(st.just("kill"), st.just("close"), st.integers(1, 2000)), max_size=12),
    junk=st.binary(max_size=40),
)
def test_any_interruption_resumes_to_the_right_bytes(size: int, steps: list[str | int], junk: bytes) -> None:
    """Cut off anywhere, by an error or by a kill (which lets go of the lock and leaves the file), also in the middle of
    a write whose bytes never reached the disk."""
    data = noise(size)
    piece = piece_of(data)
    with tempfile.TemporaryDirectory() as scratch:
        store = PieceStore(Path(scratch))
        partial = store.open_partial(piece)
        assert partial is not None
        for step in steps:
            at = partial.num_bytes
            if isinstance(step, int):
                partial.write(data[at : at + step])
                continue
            partial.close()
            if step == "kill" and at:
                with store.path(piece.digest).with_suffix(".part").open("r+b") as file:
                    file.truncate(at - 1)
            partial = PieceStore(Path(scratch)).open_partial(piece)
            assert partial is not None
            assert partial.num_bytes == at - (1 if step == "kill" and at else 0)
        partial.write(data[partial.num_bytes :])
        partial.commit()
        assert store.path(piece.digest).read_bytes() == data


@settings(max_examples=40, deadline=None)
@given(
    data=st.binary(min_size=1, max_size=300),
    left=st.integers(0, 300),
    flip=st.tuples(st.integers(0, 299), st.integers(1, 255)),
    cut=st.integers(0, 3),
)
def test_wrong_bytes_never_land(data: bytes, left: int, flip: tuple[int, int], cut: int) -> None:
    """A flipped byte, in what was there before or in what came now, or bytes that lack: nothing is kept of it, and the
    piece can be got anew."""
    piece = piece_of(data)
    wrong = bytearray(data)
    wrong[flip[0] % len(data)] ^= flip[1]
    if cut:
        wrong = bytearray(data[: -min(cut, len(data))])
    with tempfile.TemporaryDirectory() as scratch:
        store = PieceStore(Path(scratch))
        for part in (bytes(wrong[:left]), bytes(wrong[left:])):
            partial = store.open_partial(piece)
            assert partial is not None
            partial.write(part)
            partial.close()
        partial = store.open_partial(piece)
        assert partial is not None
        with pytest.raises(WrongBytes, match=piece.digest[:12]):
            partial.commit()
        partial.close()
        assert not store.has(piece.digest)
        assert store.partial_bytes(piece) == 0
        store.put(data, piece.digest)
        assert store.path(piece.digest).read_bytes() == data


def test_more_bytes_than_the_piece_has_are_refused_as_they_come(store: PieceStore) -> None:
    piece = piece_of(b"four")
    partial = store.open_partial(piece)
    assert partial is not None
    with pytest.raises(WrongBytes, match="more came"):
        partial.write(b"fives")
    partial.restart()
    partial.write(b"four")
    partial.commit()
    assert store.has(piece.digest)


@pytest.mark.parametrize("left", [b"x" * 11, b"right, but then "])
def test_what_an_earlier_fetch_left_is_never_trusted(store: PieceStore, left: bytes) -> None:
    piece = piece_of(b"right bytes")
    path = store.path(piece.digest).with_suffix(".part")
    path.parent.mkdir(parents=True)
    path.write_bytes(left)
    partial = store.open_partial(piece)
    assert partial is not None
    partial.write(b"right bytes"[partial.num_bytes :])
    try:
        partial.commit()
    except WrongBytes:
        assert not path.exists()
    else:
        assert store.path(piece.digest).read_bytes() == b"right bytes"
    assert store.has(piece.digest) == (len(left) > piece.num_bytes)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=80), st.from_regex(r"[0-9a-fA-F./\\]{60,66}", fullmatch=True)))
def test_only_digests_become_paths(text: str) -> None:
    store = PieceStore(Path("/nowhere"))
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        assert store.path(text) == Path(f"/nowhere/{text[:2]}/{text}.piece")
        return
    assert not store.has(text)
    for use in (store.path, lambda digest: store.open_partial(Piece(digest, 4)), lambda digest: store.put(b"", digest)):
        with pytest.raises(BadMessage):
            use(text)


def test_one_thread_at_a_time_gets_a_piece(store: PieceStore) -> None:
    data = noise(1000)
    piece = piece_of(data)
    first = store.open_partial(piece)
    assert first is not None
    found: list[object] = []
    other = threading.Thread(target=lambda: found.append(PieceStore(store.root).open_partial(piece)))
    other.start()
    other.join()
    assert found == [None]
    assert store.open_partial(piece) is None
    first.close()
    again = store.open_partial(piece)
    assert again is not None
    again.close()


RACER = """
import hashlib, sys, time
from pathlib import Path
from transport.messages.pieces import Piece
from transport.pieces.store import PieceStore
store, written = PieceStore(Path(sys.argv[1])), 0
todo = [hashlib.shake_128(n.to_bytes(4, "little")).digest(3000) for n in range(40)]
print("ready", flush=True)
sys.stdin.readline()
while todo:
    data = todo.pop(0)
    piece = Piece(hashlib.sha256(data).hexdigest(), len(data))
    partial = None if store.has(piece.digest) else store.open_partial(piece)
    if partial is None:
        if not store.has(piece.digest):
            todo.append(data)
        continue
    rest = data[partial.num_bytes:]
    for at in range(0, len(rest), 500):
        partial.write(rest[at:at + 500])
    written += len(rest)
    partial.commit()
print(written)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("is_windows", [False, True])
def test_a_part_has_one_writer_and_who_comes_too_late_gets_nothing(
    store: PieceStore, monkeypatch: pytest.MonkeyPatch, is_windows: bool
) -> None:
    if is_windows:
        monkeypatch.setattr(locks, "fcntl", None)
    piece = piece_of(b"onetwo")
    first = store.open_partial(piece)
    assert first is not None and store.open_partial(piece) is None
    first.write(b"one")
    assert store.clear() == 0, "it is coming in"
    first.close()
    first = store.open_partial(piece)
    assert first is not None and first.num_bytes == 3
    late = store.root / piece.digest[:2] / f"{piece.digest}.part"
    first.write(b"two")
    first.commit()
    assert store.has(piece.digest) and store.open_partial(piece) is None and not late.exists()
    assert not list(store.root.glob("??/*.lock"))
    assert store.clear() == 6
    again = store.open_partial(piece)
    assert again is not None and again.num_bytes == 0
    again.write(b"one")
    again.close()
    assert store.clear() == 3 and not late.exists()


@pytest.mark.parametrize("meanwhile", ["put", "removed"])
def test_who_opened_a_part_before_it_was_moved_or_removed_does_not_write_to_it(
    store: PieceStore, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    fcntl = pytest.importorskip("fcntl")
    piece = piece_of(b"one")
    partial = store.open_partial(piece)
    assert partial is not None
    partial.close()
    flock = fcntl.flock

    def after_another_process(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        if meanwhile == "put":
            store.put(b"one", piece.digest)
        else:
            (store.root / piece.digest[:2] / f"{piece.digest}.part").unlink()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", after_another_process)
    assert store.open_partial(piece) is None
    store.put(b"one", piece.digest)
    assert store.path(piece.digest).read_bytes() == b"one"


def test_a_lock_that_somebody_looks_at_stops_nobody(store: PieceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows removes no file that is open."""
    monkeypatch.setattr(locks, "fcntl", None)
    unlink = Path.unlink

    def looked_at(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".lock":
            raise PermissionError(13, "somebody else has it open")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", looked_at)
    piece = piece_of(b"one")
    store.put(b"one", piece.digest)
    assert store.has(piece.digest)
    assert store.open_partial(piece) is None


def test_two_processes_get_each_piece_once(store: PieceStore) -> None:
    racers = [start(RACER, str(store.root)) for _ in range(2)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    written = [int(racer.communicate("go\n", timeout=400)[0]) for racer in racers]
    assert sum(written) == 40 * 3000
    for number in range(40):
        data = noise(3000, number)
        assert store.path(piece_of(data).digest).read_bytes() == data


KILLED = """
import hashlib, sys
from pathlib import Path
from transport.messages.pieces import Piece
from transport.pieces.store import PieceStore
data = hashlib.shake_128((0).to_bytes(4, "little")).digest(1 << 20)
store = PieceStore(Path(sys.argv[1]))
lease = store.lease([Piece(hashlib.sha256(data).hexdigest(), len(data))])
partial = store.open_partial(Piece(hashlib.sha256(data).hexdigest(), len(data)))
for at in range(0, len(data), 4096):
    partial.write(data[at:at + 4096])
    print(at, flush=True)
"""


@pytest.mark.parametrize("lines", [1, 50, 200])
def test_a_process_that_is_killed_leaves_what_it_had_and_no_lock(store: PieceStore, lines: int) -> None:
    process = start(KILLED, str(store.root))
    assert process.stdout is not None
    for _ in range(lines):
        process.stdout.readline()
    process.kill()
    process.wait(timeout=400)
    process.stdout.close()
    data = noise(1 << 20)
    partial = store.open_partial(piece_of(data))
    assert partial is not None
    assert 4096 * lines <= partial.num_bytes <= len(data)
    partial.write(data[partial.num_bytes :])
    partial.commit()
    assert store.path(piece_of(data).digest).read_bytes() == data
    assert store.clear() == len(data), "its lease went with it"


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
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "potluck", str(folder)], check=False).returncode:
        pytest.skip("can't mount a tmpfs here")
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


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PotluckError, match="can't write pieces") as raised:
        PieceStore(tmp_path / "file").put(b"x", piece_of(b"x").digest)
    assert "POTLUCK_HOME" in raised.value.hint
