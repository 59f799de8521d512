"""What a host has downloaded by itself is not sent to it again; what only looks like it is not taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shard.pieces.cut_files import make_piece_list
from shard.pieces.model_fetch import copy_from_local_files
from tests.support.shard.tiny import save_tiny
from transport.messages.pieces import Piece, PieceList
from transport.pieces.store import PieceStore


@pytest.fixture
def given(tmp_path: Path) -> tuple[PieceList, dict[int, Piece], Path]:
    folder = save_tiny("llama", 0, tmp_path / "model")
    pieces = make_piece_list(folder, "tiny")
    placed = [piece for file in pieces.files for piece in file.pieces]
    needed = {number: Piece(one.digest, one.num_bytes) for number, one in enumerate(placed) if one.tensor}
    return pieces, needed, folder / "model.safetensors"


def test_the_same_file_under_another_name_is_used(
    given: tuple[PieceList, dict[int, Piece], Path], tmp_path: Path
) -> None:
    pieces, needed, file = given
    own = tmp_path / "mine.safetensors"
    own.write_bytes(file.read_bytes())
    store = PieceStore(tmp_path / "store")
    copied = copy_from_local_files(pieces, needed, store, [tmp_path / "gone", own])
    assert all(store.has(piece.digest) for piece in needed.values())
    assert copied == sum({piece.digest: piece.num_bytes for piece in needed.values()}.values())
    assert copy_from_local_files(pieces, needed, store, [own]) == 0


def test_a_file_that_can_not_be_read_is_passed_over(
    given: tuple[PieceList, dict[int, Piece], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces, needed, file = given
    bad, good = tmp_path / "bad.safetensors", tmp_path / "good.safetensors"
    for own in (bad, good):
        own.write_bytes(file.read_bytes())
    opened = Path.open

    def refused(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == bad:
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    store = PieceStore(tmp_path / "store")
    copy_from_local_files(pieces, needed, store, [bad, good])
    assert all(store.has(piece.digest) for piece in needed.values())


def test_it_ends_when_there_is_something_else_to_do_and_goes_on_later(
    given: tuple[PieceList, dict[int, Piece], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces, needed, file = given
    store = PieceStore(tmp_path / "store")
    asked: list[int] = []
    monkeypatch.setattr(store, "require_space", asked.append)
    told: list[tuple[int, int]] = []
    sizes = {piece.digest: piece.num_bytes for piece in needed.values()}
    copied = copy_from_local_files(
        pieces, needed, store, [file], progress=lambda *some: told.append(some), stop=lambda: len(told) == 2
    )
    assert 0 < copied < sum(sizes.values()) and told[-1] == (copied, sum(sizes.values()))
    assert copied + copy_from_local_files(pieces, needed, store, [file]) == sum(sizes.values())
    assert asked == [sum(sizes.values()), sum(sizes.values()) - copied], "once for all"


def test_what_came_from_others_stays_where_a_file_is_another_one(
    given: tuple[PieceList, dict[int, Piece], Path], tmp_path: Path
) -> None:
    pieces, needed, file = given
    own = tmp_path / "other.safetensors"
    own.write_bytes(bytes(file.stat().st_size))
    store = PieceStore(tmp_path / "store")
    first = next(iter(needed.values()))
    partial = store.open_partial(first)
    assert partial is not None
    partial.write(b"\1")
    partial.close()
    assert copy_from_local_files(pieces, needed, store, [own]) == 0
    assert store.partial_bytes(first) == 1


def test_a_file_of_the_same_size_with_other_bytes_gives_nothing_wrong(
    given: tuple[PieceList, dict[int, Piece], Path], tmp_path: Path
) -> None:
    pieces, needed, file = given
    other = bytearray(file.read_bytes())
    for at in range(len(other) // 2, len(other)):
        other[at] ^= 1
    own = tmp_path / "other.safetensors"
    own.write_bytes(other)
    store = PieceStore(tmp_path / "store")
    copy_from_local_files(pieces, needed, store, [own])
    there = [piece for piece in needed.values() if store.has(piece.digest)]
    assert 0 < len(there) < len(needed)
    assert not list((tmp_path / "store").rglob("*.part"))
