"""The checkpoint in a model's folder is opened, whatever the folder holds: files, or a list of pieces in a store."""

from __future__ import annotations

import contextlib
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from shard.formats.checkpoint import Checkpoint, DummyWeights
from shard.formats.gguf.index import INDEX_FILE
from shard.formats.safetensors_checkpoint import SafetensorsCheckpoint
from shard.formats.weight_folder import DescriptorCache, PlainFolder, WeightFolder, read_exactly
from shard.pieces.metadata import OPENING_PIECES, is_metadata_folder, read_list
from transport.errors import BadCheckpoint, ModelNotFound
from transport.messages.pieces import MAX_PIECE_BYTES, ListedFile, Piece, PieceList, PlacedPiece
from transport.pieces.store import PieceStore

_AHEAD_BYTES = 32 << 20
# To find a file on a cold disk takes as long as to read a small one: several are looked for at once.
_AHEAD_THREADS = 4
_TOGETHER_BYTES = 1 << 20
_CAN_READ_AHEAD = hasattr(os, "sendfile") and sys.platform == "linux"

FetchPiece = Callable[[Piece], None]
"""Puts the piece into the store, or raises a PotluckError."""


class PieceFolder:
    """The weight files of `pieces`, read from a store; `path` is what `write_metadata_from_store` made.

    A piece that the store lacks is asked for from `fetch`, without which it is an error: nothing is ever made up.
    Without a store the model can be opened, and none of its tensors read.
    """

    def __init__(
        self, path: Path, pieces: PieceList, store: PieceStore | None, *, fetch: FetchPiece | None = None
    ) -> None:
        self.path = path
        self._store = store
        self._fetch = fetch
        self._listed = {file.name: file for file in pieces.files}
        self._starts = {file.name: [piece.offset for piece in file.pieces] for file in pieces.files}
        self._files = DescriptorCache()
        self._ahead_to: dict[str, int] = {}
        self._ahead = ThreadPoolExecutor(_AHEAD_THREADS, thread_name_prefix="read-ahead")
        self._paths: dict[str, Path] = {}  # To make one takes longer than to open the file.

    def size_bytes(self, file: str) -> int:
        return self._file(file).num_bytes

    def read(self, file: str, out: np.ndarray, offset: int, what: str) -> None:
        listed = self._file(file)
        view = out.reshape(-1).view(np.uint8)
        done = 0
        index = max(0, bisect_right(self._starts[file], offset) - 1)
        while done < view.size:
            piece = listed.pieces[index] if index < len(listed.pieces) else None
            begin = offset + done
            if piece is None or not piece.offset <= begin < piece.offset + piece.num_bytes:
                raise BadCheckpoint(
                    f"{what}: no piece of the model has byte {begin:,} of {file}", hint="share the model anew"
                )
            self._schedule_read_ahead(listed, index)
            count = min(view.size - done, piece.offset + piece.num_bytes - begin)
            self._read_piece(piece, view[done : done + count], begin - piece.offset, what)
            done += count
            index += 1

    def close(self) -> None:
        self._ahead.shutdown(cancel_futures=True)
        self._files.close()

    def _schedule_read_ahead(self, file: ListedFile, index: int) -> None:
        """Have the system read the pieces that follow: within a file it does so by itself, from one to the next it does
        not. Two threads may do it twice, which costs little."""
        number = max(index + 1, self._ahead_to.get(file.name, 0))
        if self._store is None or not _CAN_READ_AHEAD or number >= len(file.pieces):
            return
        end = file.pieces[index].offset + file.pieces[index].num_bytes
        if file.pieces[number].offset - end >= _AHEAD_BYTES // 2:
            return
        together, num_bytes = [], 0
        while number < len(file.pieces) and file.pieces[number].offset - end < _AHEAD_BYTES:
            piece = file.pieces[number]
            number += 1
            if piece.tensor:
                together.append(self._stored(piece.digest, self._store))
                num_bytes += piece.num_bytes
            if num_bytes >= _TOGETHER_BYTES:
                self._read_ahead(together)
                together, num_bytes = [], 0
        self._ahead_to[file.name] = number
        self._read_ahead(together)

    def _read_ahead(self, paths: Sequence[Path]) -> None:
        with contextlib.suppress(RuntimeError):  # It was closed meanwhile.
            self._ahead.submit(_to_page_cache, paths)

    def _file(self, name: str) -> ListedFile:
        file = self._listed.get(name)
        if file is None:
            raise BadCheckpoint(f"the model in {self.path} has no file {name}", hint="share the model anew")
        return file

    def _read_piece(self, piece: PlacedPiece, out: np.ndarray, offset: int, what: str) -> None:
        path = self._path(piece, what)
        with self._files.descriptor(path, piece.num_bytes) as fd:
            read_exactly(fd, out, offset, what)

    def _stored(self, digest: str, store: PieceStore) -> Path:
        path = self._paths.get(digest)
        if path is None:
            path = self._paths[digest] = store.path(digest)
        return path

    def _path(self, piece: PlacedPiece, what: str) -> Path:
        if not piece.tensor:
            return self.path / OPENING_PIECES / piece.digest
        path = None if self._store is None else self._stored(piece.digest, self._store)
        if path is None or (self._fetch is None and not path.exists()):
            raise BadCheckpoint(
                f"{what}: piece {piece.digest[:12]} is not on this host",
                hint="it was removed meanwhile (potluck cache clear?): load the model again",
            )
        if self._fetch is not None and not path.exists():
            self._fetch(Piece(piece.digest, piece.num_bytes))
        return path


def _is_cached(fd: int) -> bool:
    """Whether the file's last byte is in the system's page cache, as far as the file system tells."""
    try:
        os.preadv(fd, [bytearray(1)], max(0, os.fstat(fd).st_size - 1), os.RWF_NOWAIT)
    except OSError:
        return False
    return True


def _to_page_cache(paths: Sequence[Path]) -> None:
    """Have the files read into the system's page cache, as far as they are there.

    To send them nowhere copies nothing, and reads as it does for who reads one after the other: in large pages. What is
    advised to be read (POSIX_FADV_WILLNEED) comes in small ones, which take twice the processor's time.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for path in paths:
            with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
                if not _is_cached(file.fileno()):
                    while os.sendfile(nowhere, file.fileno(), None, MAX_PIECE_BYTES):
                        pass
    finally:
        os.close(nowhere)


def open_checkpoint(path: Path, *, pieces: PieceStore | None = None, fetch: FetchPiece | None = None) -> Checkpoint:
    """The checkpoint in folder `path`: a Hugging Face folder, what `ingest_gguf` made, or, with weights from the store
    `pieces`, what `write_metadata_from_store` made. A piece that lacks there is asked for from `fetch`. Raises
    PotluckError."""
    if not path.is_dir():
        raise ModelNotFound(f"there is no model folder {path}", hint="potluck list shows what is there; pull it first")
    weights: WeightFolder = PlainFolder(path)
    if is_metadata_folder(path):
        if pieces is None:
            raise BadCheckpoint(f"the weights of {path} lie elsewhere, in pieces", hint="load it through the pool")
        weights = PieceFolder(path, read_list(path), pieces, fetch=fetch)
    return _opened(path, weights)


def open_with_dummy_weights(path: Path) -> Checkpoint:
    """The model in folder `path` with made-up weights, for measuring: those of the model need not be on this host.
    Raises PotluckError."""
    if is_metadata_folder(path):
        return DummyWeights(_opened(path, PieceFolder(path, read_list(path), None)))
    return DummyWeights(open_checkpoint(path))


def _opened(path: Path, weights: WeightFolder) -> Checkpoint:
    if (path / INDEX_FILE).is_file():
        from shard.formats.gguf.checkpoint import GgufCheckpoint  # The gguf package takes an eighth of a second.

        return GgufCheckpoint(path, weights=weights)
    return SafetensorsCheckpoint(path, weights=weights)
