"""The store of pieces: whatever is killed, filled or sent wrongly, what it holds under a hash has that hash."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.transport.stored_pieces import noise, piece_of
from transport.errors import BadMessage, PotluckError, WrongBytes
from transport.messages.pieces import Piece
from transport.pieces.store import PieceStore


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


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PotluckError, match="can't write pieces") as raised:
        PieceStore(tmp_path / "file").put(b"x", piece_of(b"x").digest)
    assert "POTLUCK_HOME" in raised.value.hint
