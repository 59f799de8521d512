"""A model on other hosts is fetched: metadata first, then a stage's pieces, from local copies if there are any."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq

from shard.formats.checkpoint import Checkpoint
from shard.pieces.metadata import read_complete_list, read_list, write_metadata_from_store
from shard.pieces.open import open_checkpoint
from shard.pieces.piece_list import decode_piece_list, encode_piece_list, engine_pieces, metadata_pieces, stage_pieces
from transport.errors import BadMessage, DownloadFailed
from transport.links.secure_endpoints import SecureEndpoints
from transport.messages.pieces import MAX_LIST_BYTES, ListedFile, Piece, PieceList, PlacedPiece
from transport.messages.pool import PiecePeer, SharedModel
from transport.pieces.client import fetch_small
from transport.pieces.fetcher import FetchReport, ReportProgress, fetch
from transport.pieces.locks import Lease
from transport.pieces.store import PieceStore, is_digest

log = logging.getLogger("potluck.worker")


def copy_from_local_files(
    pieces: PieceList,
    needed: Mapping[int, Piece],
    store: PieceStore,
    files: Sequence[Path],
    *,
    progress: ReportProgress = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Copy into the store what it lacks of the `needed` pieces, by their numbers in the list, and one of this host's
    `files` has. The bytes copied; what had been copied when `stop` said so is kept.

    A file is looked into if it is as large as one of the list's: each piece is then checked by its hash, and a first
    one that is wrong says that it is another file. Raises NoSpace.
    """
    candidates = list(_candidates(pieces, needed, store, files))
    total = sum({placed.digest: placed.num_bytes for _, missing in candidates for placed in missing}.values())
    if candidates:
        store.require_space(total)
    copied = 0
    for own, missing in candidates:
        try:
            for num_bytes in _copy_pieces(own, missing, store):
                copied += num_bytes
                progress(copied, total)
                if stop():
                    return copied
        except OSError as error:  # Of reading it: what the store says is no OSError.
            log.warning("%s can't be read: %s", own, error.strerror)
    return copied


def _candidates(
    pieces: PieceList, needed: Mapping[int, Piece], store: PieceStore, files: Sequence[Path]
) -> Iterator[tuple[Path, list[PlacedPiece]]]:
    """The files that may have something, each with what it may have."""
    sizes = {own: _size(own) for own in files}
    first = 0
    for listed in pieces.files:
        same_size = [own for own, size in sizes.items() if size == listed.num_bytes]
        missing = _missing_pieces(listed, first, needed, store) if same_size else []
        first += len(listed.pieces)
        if missing:
            yield from ((own, missing) for own in same_size)


def _missing_pieces(
    listed: ListedFile, first: int, needed: Mapping[int, Piece], store: PieceStore
) -> list[PlacedPiece]:
    numbered = enumerate(listed.pieces, first)
    return [placed for number, placed in numbered if number in needed and not store.has(placed.digest)]


def _copy_pieces(local_file: Path, missing: Sequence[PlacedPiece], store: PieceStore) -> Iterator[int]:
    """The bytes of each piece that is copied, until one is not in the file. Raises OSError."""
    with local_file.open("rb") as file:
        for placed in missing:
            if store.has(placed.digest):
                continue
            file.seek(placed.offset)
            data = file.read(placed.num_bytes)
            if hashlib.sha256(data).hexdigest() != placed.digest:
                return
            store.put(data, placed.digest)
            yield len(data)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


IsStopped = Callable[[], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceFolders:
    """Where this host keeps pieces of models, and the folders that such models are opened from, by digest; `own` are
    weight files of models that it has by itself."""

    pieces: Path
    shared: Path
    local_files: tuple[Path, ...] = ()


class ModelFetcher:
    """Gets models from the hosts that a `SharedModel` names, into this host's store. One thread at a time."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], edges: SecureEndpoints, folders: PieceFolders) -> None:
        self._context = context
        self._edges = edges
        self._folders = folders
        self.store = PieceStore(folders.pieces)

    def fetch_metadata(self, shared: SharedModel, stop: IsStopped = lambda: False, *, for_engine: bool = False) -> Path:
        """The folder that the model is opened from, without its weights; with the tokenizer's files if it is
        `for_engine`. Nothing is asked for if it is here. Raises DownloadFailed, BadMessage, NoSpace."""
        self._fetch_piece_list(shared, stop, for_engine=for_engine)
        return self._folder(shared)

    def open(self, shared: SharedModel) -> Checkpoint:
        """After `skeleton`. A piece that is needed and not here is got when it is read."""

        def fetch_one(piece: Piece) -> None:
            self._fetch(shared, self._numbers_of(shared, piece))

        return open_checkpoint(self._folder(shared), pieces=self.store, fetch=fetch_one)

    def fetch_stage(
        self,
        shared: SharedModel,
        checkpoint: Checkpoint,
        first: int,
        last: int,
        *,
        leases: contextlib.ExitStack,
        progress: ReportProgress,
        stop: IsStopped,
    ) -> FetchReport:
        """Get what a stage of layers [first, last) lacks; it stays on the disk as long as `leases` is open.

        Raises NoSpace before anything is sent, DownloadFailed. Not complete if `stop` said so.
        """
        pieces = self._fetch_piece_list(shared, stop)
        # What opening it takes is in its folder, and need not be in the store: on a host that has the model itself, the
        # store may have none of it.
        opened = metadata_pieces(pieces)
        named = stage_pieces(pieces, checkpoint.spec, first, last)
        needed = {number: piece for number, piece in named.items() if number not in opened}
        # By the list others are told what this host has.
        listed = Piece(shared.digest, len(encode_piece_list(pieces)))
        lease: Lease = self.store.lease([listed, *needed.values()])
        leases.enter_context(lease)
        copy_from_local_files(pieces, needed, self.store, self._folders.local_files, progress=progress, stop=stop)
        return self._fetch(shared, needed, progress=progress, stop=stop)

    def _fetch_piece_list(self, shared: SharedModel, stop: IsStopped, *, for_engine: bool = False) -> PieceList:
        if not is_digest(shared.digest):
            raise BadMessage(f"{shared.digest[:80]!r} is no model's digest")
        here = read_complete_list(self._folder(shared), shared.digest, for_engine=for_engine)
        if here is not None:
            self.store.put(encode_piece_list(here), shared.digest)  # Others are told by it what this host has.
            return here
        data = self.store.read(shared.digest)
        if data is None:
            data = fetch_small(
                shared.digest,
                self._peers(shared),
                MAX_LIST_BYTES,
                curve=self._edges.curve,
                context=self._context,
                what=f"the list of {shared.name}'s pieces",
                stop=stop,
            )
            self.store.put(data, shared.digest)
        pieces = decode_piece_list(data)
        needed = {**metadata_pieces(pieces), **(engine_pieces(pieces) if for_engine else {})}
        with self.store.lease(list(needed.values())):
            if not self._fetch(shared, needed, stop=stop).is_complete:
                raise DownloadFailed(f"getting {shared.name} was stopped")
            write_metadata_from_store(pieces, self.store, self._folder(shared), for_engine=for_engine)
        return pieces

    def _fetch(
        self,
        shared: SharedModel,
        pieces: dict[int, Piece],
        *,
        progress: ReportProgress = lambda done, total: None,
        stop: IsStopped = lambda: False,
    ) -> FetchReport:
        return fetch(
            pieces,
            self.store,
            shared,
            curve=self._edges.curve,
            context=self._context,
            progress=progress,
            stop=stop,
        )

    def _numbers_of(self, shared: SharedModel, piece: Piece) -> dict[int, Piece]:
        pieces = read_list(self._folder(shared))
        placed = (each for file in pieces.files for each in file.pieces)
        return {number: piece for number, each in enumerate(placed) if each.digest == piece.digest}

    def _peers(self, shared: SharedModel) -> list[PiecePeer]:
        return [peer for peer in shared.peers if peer.key != self._edges.key]

    def _folder(self, shared: SharedModel) -> Path:
        return self._folders.shared / shared.digest
