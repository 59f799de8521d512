"""What a piece server finds, and what it does not take for what it was."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.transport.pieces_pool import Model, Pool
from transport.messages.pieces import has_piece
from transport.pieces.piece_source import FolderSource, StoreSource
from transport.pieces.store import PieceStore
from transport.process.files import FileStamp, OpenFileCache

MODEL = Model(1000, 50, 300)
FILE = MODEL.list.files[0].name


def stamp(path: Path) -> FileStamp:
    return FileStamp.of(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / FILE).write_bytes(b"".join(MODEL.contents))
    (tmp_path / "list.json").write_bytes(MODEL.list_bytes)
    return tmp_path


@pytest.fixture
def source(folder: Path) -> FolderSource:
    return FolderSource(
        folder, MODEL.list, model=MODEL.digest, stamps={FILE: stamp(folder / FILE)}, list_file=folder / "list.json"
    )


@pytest.fixture
def files() -> Iterator[OpenFileCache]:
    files = OpenFileCache(max_files=2)
    yield files
    files.close()


def test_a_folders_pieces_are_found_where_they_lie(source: FolderSource, files: OpenFileCache) -> None:
    for piece, content in zip(MODEL.pieces.values(), MODEL.contents, strict=True):
        located = source.locate(piece.digest)
        assert located is not None
        assert files.read(*located) == content
    listed = source.locate(MODEL.digest)
    assert listed is not None and files.read(*listed) == MODEL.list_bytes
    assert source.locate("0" * 64) is None
    assert [has_piece(source.have_bitmap(MODEL.digest), index) for index in range(4)] == [True, True, True, False]
    assert source.have_bitmap("0" * 64) == b""


@pytest.mark.parametrize("how", ["written", "replaced", "longer", "removed"])
def test_a_file_that_has_changed_is_not_given_for_what_it_was(folder: Path, source: FolderSource, how: str) -> None:
    path = folder / FILE
    assert source.locate(MODEL.pieces[0].digest) is not None
    before = path.stat()
    if how == "removed":
        path.unlink()
    elif how == "replaced":
        (folder / "new").write_bytes(bytes(before.st_size))
        (folder / "new").replace(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    else:
        with path.open("r+b") as file:
            file.write(b"x") if how == "written" else file.truncate(before.st_size + 1)
        later = before.st_mtime_ns + (1 if how == "written" else 0)
        os.utime(path, ns=(before.st_atime_ns, later))
    assert source.locate(MODEL.pieces[0].digest) is None
    assert not has_piece(source.have_bitmap(MODEL.digest), 0)


def test_a_file_without_a_stamp_is_left_out(folder: Path) -> None:
    source = FolderSource(folder, MODEL.list, model=MODEL.digest, stamps={})
    assert source.locate(MODEL.pieces[0].digest) is None
    assert source.locate(MODEL.digest) is None


def test_a_file_with_the_same_name_is_opened_anew(tmp_path: Path, files: OpenFileCache) -> None:
    path = tmp_path / "file"
    for content in (b"one", b"two", b"three"):
        (tmp_path / "new").write_bytes(content)
        (tmp_path / "new").replace(path)
        assert files.read(path, 0, 100) == content


def test_few_files_stay_open(tmp_path: Path, files: OpenFileCache) -> None:
    for number in range(20):
        (tmp_path / str(number)).write_bytes(bytes([number]))
    for _ in range(2):
        for number in range(20):
            assert files.read(tmp_path / str(number), 0, 1) == bytes([number])
    if Path("/proc/self/fd").exists():
        targets = [entry.resolve() for entry in Path("/proc/self/fd").iterdir()]
        assert sum(target.is_relative_to(tmp_path) for target in targets) == 2


def test_a_store_knows_a_model_by_its_list(tmp_path: Path) -> None:
    now_s = 0.0
    store = PieceStore(tmp_path)
    source = StoreSource(store, clock=lambda: now_s)

    def held() -> list[bool]:
        return [has_piece(source.have_bitmap(MODEL.digest), index) for index in range(3)]

    assert source.have_bitmap(MODEL.digest) == b""
    store.put(MODEL.list_bytes, MODEL.digest)
    store.put(MODEL.contents[2], MODEL.pieces[2].digest)
    assert held() == [False, False, True]
    store.put(MODEL.contents[0], MODEL.pieces[0].digest)
    now_s = 1.0
    assert held() == [True, False, True]
    store.path(MODEL.pieces[2].digest).unlink()
    assert source.locate(MODEL.pieces[2].digest) is None
    assert held() == [True, False, True], "a moment old"
    now_s = 2.0
    assert held() == [True, False, False]
    assert source.have_bitmap(MODEL.pieces[0].digest) == b"", "a piece is no list"


def test_what_is_here_of_a_long_list_is_found_quickly(tmp_path: Path) -> None:
    """Nobody gets anything meanwhile."""
    model, store = Model(*range(1, 10_001)), PieceStore(tmp_path)
    store.put(model.list_bytes, model.digest)
    for index in (0, 5000):
        store.put(model.contents[index], model.pieces[index].digest)
    looks = iter(range(100))
    source = StoreSource(store, clock=lambda: float(next(looks)))
    began_s = time.process_time()
    for _ in range(10):
        found = source.have_bitmap(model.digest)
    assert time.process_time() - began_s < 0.5
    assert [index for index in range(10_000) if has_piece(found, index)] == [0, 5000]


def test_models_in_folders_are_given_beside_the_store(tmp_path: Path, source: FolderSource) -> None:
    more = Model(2000, 3, seed=5)
    with Pool(tmp_path / "pool") as pool:
        head, other = pool.host("head", more), pool.host("other")
        pool.serve(head, sources=[source, StoreSource(head.store)])
        assert other.fetch(MODEL, [head.peer]).is_complete and other.has(MODEL)
        assert other.fetch(more, [head.peer]).is_complete and other.has(more)
