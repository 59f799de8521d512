"""Models in pieces: a store that holds all of a model, or some of it, and what is read of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shard.formats.gguf.ingest import ingest_gguf
from shard.pieces.cut_files import make_piece_list, model_files
from shard.pieces.metadata import write_metadata_from_store
from shard.pieces.open import PieceFolder
from transport.messages.pieces import Piece, PieceList, PlacedPiece
from transport.pieces.store import PieceStore


@contextmanager
def noted_reads() -> Iterator[set[str]]:
    """The digests of the pieces of weights that are read meanwhile."""
    noted: set[str] = set()
    path_of = PieceFolder._path

    def noting(self: PieceFolder, piece: PlacedPiece, what: str) -> Path:
        noted.add(piece.digest)
        return path_of(self, piece, what)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PieceFolder, "_path", noting)
        yield noted


def contents(folder: Path, pieces: PieceList) -> dict[str, bytes]:
    """Each piece's bytes, from the files of the model in `folder`."""
    files = model_files(folder)
    found: dict[str, bytes] = {}
    for file in pieces.files:
        whole = (
            files.non_weights[file.name] if file.name in files.non_weights else files.weights[file.name].read_bytes()
        )
        for piece in file.pieces:
            found[piece.digest] = whole[piece.offset : piece.offset + piece.num_bytes]
    return found


def stored(folder: Path, root: Path, pieces: PieceList, only: Iterable[Piece] | None = None) -> PieceStore:
    """A store with all pieces of the model, or `only` some."""
    store = PieceStore(root)
    found = contents(folder, pieces)
    for digest in found if only is None else {piece.digest for piece in only}:
        store.put(found[digest], digest)
    return store


def pieced(folder: Path, scratch: Path) -> tuple[PieceList, Path, PieceStore]:
    """The model's list, its skeleton, and a store with all of it."""
    pieces = make_piece_list(folder, "tiny")
    store = stored(folder, scratch / "store", pieces)
    write_metadata_from_store(pieces, store, scratch / "skeleton")
    return pieces, scratch / "skeleton", store


def ingested(file: Path, folder: Path) -> Path:
    folder.mkdir()
    ingest_gguf(file, folder, recorded_as=str(file))
    return folder
