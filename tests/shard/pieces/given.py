"""Models in pieces, for tests: a store that holds all of a model, or some of it, and notes what is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from shard.piece_list import make_piece_list, model_files
from shard.shared_model import materialize
from transport.pieces.piece import Piece, PieceList
from transport.pieces.store import PieceStore


class NotingStore(PieceStore):
    """`read` are the digests of the pieces whose files were asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read: set[str] = set()

    def path(self, digest: str) -> Path:
        if hasattr(self, "read"):
            self.read.add(digest)
        return super().path(digest)


def contents(folder: Path, pieces: PieceList) -> dict[str, bytes]:
    """Each piece's bytes, from the files of the model in `folder`."""
    files = model_files(folder)
    found: dict[str, bytes] = {}
    for file in pieces.files:
        whole = files.small[file.name] if file.name in files.small else files.weights[file.name].read_bytes()
        for piece in file.pieces:
            found[piece.digest] = whole[piece.offset : piece.offset + piece.num_bytes]
    return found


def stored(folder: Path, root: Path, pieces: PieceList, only: Iterable[Piece] | None = None) -> NotingStore:
    """A store with all pieces of the model, or `only` some."""
    store = NotingStore(root)
    found = contents(folder, pieces)
    for digest in found if only is None else {piece.digest for piece in only}:
        store.put(found[digest], digest)
    store.read.clear()
    return store


def pieced(folder: Path, scratch: Path) -> tuple[PieceList, Path, NotingStore]:
    """The model's list, its skeleton, and a store with all of it."""
    pieces = make_piece_list(folder, "tiny")
    store = stored(folder, scratch / "store", pieces)
    materialize(pieces, store, scratch / "skeleton")
    store.read.clear()
    return pieces, scratch / "skeleton", store
