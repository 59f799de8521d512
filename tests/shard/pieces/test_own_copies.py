"""What a host has downloaded by itself is not sent to it again; what only looks like it is not taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from shard.own_copies import take_from_own_files
from shard.piece_list import make_piece_list
from tests.shard.tiny import save_tiny
from transport.pieces.piece import Piece, PieceList
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
    copied = take_from_own_files(pieces, needed, store, [tmp_path / "gone", own])
    assert all(store.has(piece.digest) for piece in needed.values())
    assert copied == sum({piece.digest: piece.num_bytes for piece in needed.values()}.values())
    assert take_from_own_files(pieces, needed, store, [own]) == 0


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
    take_from_own_files(pieces, needed, store, [own])
    there = [piece for piece in needed.values() if store.has(piece.digest)]
    assert 0 < len(there) < len(needed)
    assert not list((tmp_path / "store").rglob("*.part"))
