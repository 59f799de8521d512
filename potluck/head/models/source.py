"""A model source says where the workers of a ring get its model from: this host's store, or another host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from potluck.head.hosts import piece_peers
from potluck.head.models.remote import RemoteModel
from potluck.head.models.search import ModelRequest
from potluck.head.pool import Pool, PoolWorker
from potluck.head.progress import HeadProgress
from potluck.head.ring import RingStage
from potluck.host.local_host import ThisHost
from potluck.host.piece_server import HostPieceServer, share_stored_model
from potluck.store.manifest import StoredModel
from shard.pieces.metadata import SharedFolders
from shard.pieces.piece_list import stage_pieces
from transport.messages.pool import PiecePeer, SharedModel
from transport.pieces.assignment import assign_pieces


class LocalModel:
    """One model of this host, for this host alone."""

    def __init__(self, model: StoredModel) -> None:
        self._model = model

    def update_host(self, here: ThisHost) -> None:
        pass  # Nobody else reaches it.

    def prepare(self, say: Callable[[str], object], *, for_others: bool) -> StoredModel:
        return self._model

    def share_for_worker(self, worker: PoolWorker) -> SharedModel | None:
        return None

    def share_for_stages(self, stages: Sequence[RingStage]) -> Mapping[int, SharedModel]:
        return {}


class PublishedModel:
    """One model of this host, for the workers of other hosts. `ready` before the rest."""

    def __init__(self, model: StoredModel, here: ThisHost, piece_server: HostPieceServer, pool: Pool) -> None:
        self._model = model
        self._here = here
        self._piece_server = piece_server
        self._pool = pool
        self._folders: SharedFolders | None = None

    def update_host(self, here: ThisHost) -> None:
        """This host has another address."""
        self._here = here
        self._piece_server.update_host(here)

    def prepare(self, say: Callable[[str], object], *, for_others: bool) -> StoredModel:
        """The model that is to be loaded now. `for_others`: cut into pieces, if that is not done yet: its files are
        read once. Raises PotluckError."""
        if not for_others:
            return self._model
        is_announced = False

        def progress(done: int, total: int) -> None:
            nonlocal is_announced
            if not is_announced:
                is_announced = True
                say(f"Reading {self._model.name} once, to share it with other hosts ({total / 2**20:,.0f} MiB)")

        self._folders = share_stored_model(self._model, progress)
        self._piece_server.share_model(self._folders)
        return self._model

    def share_for_worker(self, worker: PoolWorker) -> SharedModel | None:
        """To open the model without its weights; None for a worker of this host."""
        return self._shared() if worker.is_remote else None

    def share_for_stages(self, stages: Sequence[RingStage]) -> Mapping[int, SharedModel]:
        """To load them all at once, by the stage's number: what several hosts lack leaves this one once."""
        folders = self._folders
        remote = [stage for stage in stages if stage.worker.is_remote]
        if folders is None or not remote:
            return {}
        needs: dict[str, set[int]] = {}
        for stage in remote:
            needed = stage_pieces(folders.pieces, self._model.spec, stage.first, stage.last)
            needs.setdefault(self._pool.key_of(stage.worker), set()).update(needed)
        sizes = [piece.num_bytes for file in folders.pieces.files for piece in file.pieces]
        hints = assign_pieces({key: sorted(numbers) for key, numbers in needs.items()}, sizes)
        return {
            stage.index: msgspec.structs.replace(self._shared(), hints=hints[self._pool.key_of(stage.worker)])
            for stage in remote
        }

    def _shared(self) -> SharedModel:
        assert self._folders is not None, "offered before it is loaded"
        own = PiecePeer(self._here.name, self._piece_server.endpoint, self._pool.own_key)
        peers = (*piece_peers(self._pool.hosts), own)
        return SharedModel(name=self._model.name, digest=self._folders.digest, peers=peers)


class ModelSource(Protocol):
    """A model, and where its workers get it from."""

    def update_host(self, here: ThisHost) -> None:
        """The head's host has another address."""

    def prepare(self, say: Callable[[str], object], *, for_others: bool) -> StoredModel:
        """The model as it is to be loaded now; `for_others`: by workers of other hosts too. Raises PotluckError."""

    def share_for_worker(self, worker: PoolWorker) -> SharedModel | None:
        """For one that is to open it without its weights; None if it lies on the worker's host."""

    def share_for_stages(self, stages: Sequence[RingStage]) -> Mapping[int, SharedModel]:
        """For all that load it, by the stage's number, without those on whose host it lies."""


def find_model(
    model: StoredModel | ModelRequest,
    *,
    here: ThisHost,
    piece_server: HostPieceServer | None,
    pool: Pool,
    run_dir: Path,
    progress: HeadProgress,
) -> ModelSource:
    """For whichever workers there will be; `giver` is None where no other host can come. May wait long for a host that
    has the model.

    Raises ModelNotFound, DeadlineExceeded, and what a pull raises.
    """
    if isinstance(model, ModelRequest):
        if piece_server is not None:
            remote = RemoteModel(model, here, piece_server, pool, run_dir, say=progress.say)
            if remote.find():
                return remote
        if model.pull is None:
            raise model.missing
        model = model.pull(progress.pulling)
    return LocalModel(model) if piece_server is None else PublishedModel(model, here, piece_server, pool)
