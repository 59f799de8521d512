"""The head's model for the hosts that lack it: offered in pieces, and who gets what from whom."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import zmq

from potluck.lan import ThisHost
from potluck.paths import pieces_dir, shared_dir
from potluck.pool import Pool, PoolWorker
from potluck.pool_hosts import PoolHosts
from potluck.ring import RingStage
from potluck.store import StoredModel
from shard.needed_pieces import stage_pieces
from shard.piece_list import HashProgress
from shard.shared_model import OfferedModel, offer_model
from transport.curve import Admits, Curve
from transport.endpoints import port_of, tcp_endpoint
from transport.pieces.piece_source import FolderSource, PieceSource, Stamp, StoreSource, WholeFiles
from transport.pieces.server import PieceServer
from transport.pieces.sources import share_hints
from transport.pieces.store import PieceStore
from transport.pool_messages import PiecePeer, SharedModel

_IO_THREADS = 2
_MAX_OFFERED = 8


class PieceGiver:
    """This host's piece server, in a context of its own: members of the pool get from it what they lack."""

    def __init__(self, here: ThisHost, endpoint: str, admits: Admits) -> None:
        """Raises ConfigError if it can't listen at `endpoint`."""
        assert here.keys is not None and here.address is not None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(_IO_THREADS)
        self._curve = Curve(self._context, here.keys)
        self._store = StoreSource(PieceStore(pieces_dir()))
        self._files = WholeFiles()
        self._offering = threading.Lock()
        self._offered: dict[str, tuple[PieceSource, ...]] = {}
        sources: list[PieceSource] = [self._files, self._store]
        try:
            self._server = PieceServer(self._context, endpoint, self._curve.guard(admits), sources)
        except BaseException:
            self._curve.close()
            self._context.destroy(0)
            raise
        # It may listen at every address; others reach it at one.
        self.endpoint = tcp_endpoint(here.address, port_of(self._server.endpoint))

    def moved(self, here: ThisHost) -> None:
        assert here.address is not None
        self.endpoint = tcp_endpoint(here.address, port_of(self._server.endpoint))

    @property
    def sent_bytes(self) -> int:
        """Of pieces, since it was started."""
        return self._server.sent_bytes

    def offer(self, model: OfferedModel) -> None:
        """Give pieces of that model too, from where its files lie."""
        folders: tuple[PieceSource, ...] = tuple(
            FolderSource(
                folder,
                model.pieces,
                model=model.digest,
                stamps={name: Stamp(stamp.num_bytes, stamp.mtime_ns) for name, stamp in stamps.items()},
                list_file=model.list_file,
            )
            for folder, stamps in ((model.weights, model.weight_stamps), (model.skeleton, model.skeleton_stamps))
        )
        with self._offering:
            self._offered.pop(model.digest, None)
            self._offered[model.digest] = folders
            while len(self._offered) > _MAX_OFFERED:
                del self._offered[next(iter(self._offered))]
            given = [source for sources in self._offered.values() for source in sources]
            self._server.sources = (*given, self._files, self._store)

    def offer_file(self, sha256: str, path: Path) -> int:
        """Give the whole file with that checksum too; how many bytes it has. Raises OSError."""
        return self._files.add(sha256, path)

    def close(self) -> None:
        self._server.close()
        self._curve.close()
        self._context.destroy(0)


def offer_stored(model: StoredModel, progress: HashProgress = lambda done, total: None) -> OfferedModel:
    """That model of the store, in pieces: its files are read, if that is not done yet. Raises PotluckError."""
    checksums = {Path(file.name).name: file.sha256 for file in model.files if file.sha256 is not None}
    return offer_model(model.path, model.name, shared_dir(), progress, checksums=checksums)


class OwnModel:
    """One model of this host, for this host alone."""

    def __init__(self, model: StoredModel) -> None:
        self._model = model

    def moved(self, here: ThisHost) -> None:
        pass  # Nobody else reaches it.

    def ready(self, say: Callable[[str], object], *, for_others: bool) -> StoredModel:
        return self._model

    def for_worker(self, worker: PoolWorker) -> SharedModel | None:
        return None

    def for_stages(self, stages: Sequence[RingStage]) -> Mapping[int, SharedModel]:
        return {}


class ModelShare:
    """One model of this host, for the workers of other hosts. `ready` before the rest."""

    def __init__(self, model: StoredModel, here: ThisHost, giver: PieceGiver, pool: Pool) -> None:
        self._model = model
        self._here = here
        self._giver = giver
        self._pool = pool
        self._offered: OfferedModel | None = None

    def moved(self, here: ThisHost) -> None:
        """This host has another address."""
        self._here = here
        self._giver.moved(here)

    def ready(self, say: Callable[[str], object], *, for_others: bool) -> StoredModel:
        """The model that is to be loaded now. `for_others`: cut into pieces, if that is not done yet: its files are
        read once. Raises PotluckError."""
        if not for_others:
            return self._model
        is_said = False

        def progress(done: int, total: int) -> None:
            nonlocal is_said
            if not is_said:
                is_said = True
                say(f"Reading {self._model.name} once, to share it with other hosts ({total / 2**20:,.0f} MiB)")

        self._offered = offer_stored(self._model, progress)
        self._giver.offer(self._offered)
        return self._model

    def for_worker(self, worker: PoolWorker) -> SharedModel | None:
        """To open the model without its weights; None for a worker of this host."""
        return self._shared() if worker.is_remote else None

    def for_stages(self, stages: Sequence[RingStage]) -> Mapping[int, SharedModel]:
        """To load them all at once, by the stage's number: what several hosts lack leaves this one once."""
        offered = self._offered
        remote = [stage for stage in stages if stage.worker.is_remote]
        if offered is None or not remote:
            return {}
        needs: dict[str, set[int]] = {}
        for stage in remote:
            needed = stage_pieces(offered.pieces, self._model.spec, stage.first, stage.last)
            needs.setdefault(self._pool.key_of(stage.worker), set()).update(needed)
        sizes = [piece.num_bytes for file in offered.pieces.files for piece in file.pieces]
        hints = share_hints({key: sorted(numbers) for key, numbers in needs.items()}, sizes)
        return {
            stage.index: msgspec.structs.replace(self._shared(), hints=hints[self._pool.key_of(stage.worker)])
            for stage in remote
        }

    def _shared(self) -> SharedModel:
        assert self._offered is not None, "offered before it is loaded"
        own = PiecePeer(self._here.name, self._giver.endpoint, self._pool.own_key)
        peers = (*piece_peers(self._pool.hosts), own)
        return SharedModel(name=self._model.name, digest=self._offered.digest, peers=peers)


def piece_peers(hosts: PoolHosts) -> list[PiecePeer]:
    """The other hosts that give pieces, by name."""
    return [PiecePeer(host.name, host.arrive.pieces, host.key) for host in hosts.all() if host.arrive.pieces]
