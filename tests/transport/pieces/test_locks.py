"""A piece has one writer at a time, of all threads and processes, and a killed one leaves no lock."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.support.transport.stored_pieces import noise, piece_of, start
from transport.pieces import locks
from transport.pieces.store import PieceStore


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
    fcntl = pytest.importorskip("fcntl", reason="needs fcntl")
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
