"""A worker's way to a model that lies on other hosts: first what opening it takes, then the pieces of its own stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zmq

from shard.checkpoint import Checkpoint
from shard.needed_pieces import engine_pieces, nameless_pieces, stage_pieces
from shard.open import open_checkpoint
from shard.own_copies import take_from_own_files
from shard.piece_list_wire import decode_piece_list, encode_piece_list
from shard.shared_model import materialize, read_list, whole_list
from transport.edges import Edges
from transport.errors import BadMessage, DownloadFailed
from transport.pieces.fetcher import FetchReport, ReportProgress, fetch
from transport.pieces.leases import Lease
from transport.pieces.piece import MAX_LIST_BYTES, Piece, PieceList
from transport.pieces.store import PieceStore, is_digest
from transport.pieces.whole import fetch_bytes
from transport.pool_messages import PiecePeer, SharedModel

Stop = Callable[[], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceFolders:
    """Where this host keeps pieces of models, and the folders that such models are opened from, by digest; `own` are
    weight files of models that it has by itself."""

    pieces: Path
    shared: Path
    own: tuple[Path, ...] = ()


class ModelFetch:
    """Gets models from the hosts that a `SharedModel` names, into this host's store. One thread at a time."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], edges: Edges, folders: PieceFolders) -> None:
        self._context = context
        self._edges = edges
        self._folders = folders
        self.store = PieceStore(folders.pieces)

    def skeleton(self, shared: SharedModel, stop: Stop = lambda: False, *, for_engine: bool = False) -> Path:
        """The folder that the model is opened from, without its weights; with the tokenizer's files if it is
        `for_engine`. Nothing is asked for if it is here. Raises DownloadFailed, BadMessage, NoSpace."""
        self._list_of(shared, stop, for_engine=for_engine)
        return self._folder(shared)

    def open(self, shared: SharedModel) -> Checkpoint:
        """After `skeleton`. A piece that is needed and not here is got when it is read."""

        def fetch_one(piece: Piece) -> None:
            self._fetch(shared, self._numbered(shared, piece))

        return open_checkpoint(self._folder(shared), pieces=self.store, fetch=fetch_one)

    def stage(
        self,
        shared: SharedModel,
        checkpoint: Checkpoint,
        first: int,
        last: int,
        *,
        leases: contextlib.ExitStack,
        progress: ReportProgress,
        stop: Stop,
    ) -> FetchReport:
        """Get what a stage of layers [first, last) lacks; it stays on the disk as long as `leases` is open.

        Raises NoSpace before anything is sent, DownloadFailed. Not complete if `stop` said so.
        """
        pieces = self._list_of(shared, stop)
        # What opening it takes is in its folder, and need not be in the store: on a host that has the model itself, the
        # store may have none of it.
        opened = nameless_pieces(pieces)
        named = stage_pieces(pieces, checkpoint.spec, first, last)
        needed = {number: piece for number, piece in named.items() if number not in opened}
        # By the list others are told what this host has.
        listed = Piece(shared.digest, len(encode_piece_list(pieces)))
        lease: Lease = self.store.lease([listed, *needed.values()])
        leases.enter_context(lease)
        take_from_own_files(pieces, needed, self.store, self._folders.own, progress=progress, stop=stop)
        return self._fetch(shared, needed, progress=progress, stop=stop)

    def _list_of(self, shared: SharedModel, stop: Stop, *, for_engine: bool = False) -> PieceList:
        if not is_digest(shared.digest):
            raise BadMessage(f"{shared.digest[:80]!r} is no model's digest")
        here = whole_list(self._folder(shared), shared.digest, for_engine=for_engine)
        if here is not None:
            self.store.put(encode_piece_list(here), shared.digest)  # Others are told by it what this host has.
            return here
        data = self.store.read(shared.digest)
        if data is None:
            data = fetch_bytes(
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
        needed = {**nameless_pieces(pieces), **(engine_pieces(pieces) if for_engine else {})}
        with self.store.lease(list(needed.values())):
            if not self._fetch(shared, needed, stop=stop).is_complete:
                raise DownloadFailed(f"getting {shared.name} was stopped")
            materialize(pieces, self.store, self._folder(shared), for_engine=for_engine)
        return pieces

    def _fetch(
        self,
        shared: SharedModel,
        pieces: dict[int, Piece],
        *,
        progress: ReportProgress = lambda done, total: None,
        stop: Stop = lambda: False,
    ) -> FetchReport:
        return fetch(
            pieces,
            self.store,
            self._peers(shared),
            curve=self._edges.curve,
            context=self._context,
            model=shared.digest,
            what=shared.name,
            hints=shared.hints,
            progress=progress,
            stop=stop,
        )

    def _numbered(self, shared: SharedModel, piece: Piece) -> dict[int, Piece]:
        pieces = read_list(self._folder(shared))
        placed = (each for file in pieces.files for each in file.pieces)
        return {number: piece for number, each in enumerate(placed) if each.digest == piece.digest}

    def _peers(self, shared: SharedModel) -> list[PiecePeer]:
        return [peer for peer in shared.peers if peer.key != self._edges.key]

    def _folder(self, shared: SharedModel) -> Path:
        return self._folders.shared / shared.digest
