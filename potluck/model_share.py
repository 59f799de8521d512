"""The head's model for the hosts that lack it: offered in pieces, and who gets what from whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import zmq

from potluck.lan import ThisHost
from potluck.paths import pieces_dir, shared_dir
from potluck.pool import Pool, PoolWorker
from potluck.ring import RingStage
from potluck.store import StoredModel
from shard.needed_pieces import stage_pieces
from shard.shared_model import OfferedModel, offer_model
from transport.curve import Admits, Curve
from transport.endpoints import port_of, tcp_endpoint
from transport.pieces.piece_source import FolderSource, PieceSource, Stamp, StoreSource
from transport.pieces.server import PieceServer
from transport.pieces.sources import share_hints
from transport.pieces.store import PieceStore
from transport.pool_messages import PiecePeer, SharedModel

_IO_THREADS = 2


class PieceGiver:
    """This host's piece server, in a context of its own: members of the pool get from it what they lack."""

    def __init__(self, here: ThisHost, endpoint: str, admits: Admits) -> None:
        """Raises ConfigError if it can't listen at `endpoint`."""
        assert here.keys is not None and here.address is not None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(_IO_THREADS)
        self._curve = Curve(self._context, here.keys)
        self._store = StoreSource(PieceStore(pieces_dir()))
        try:
            self._server = PieceServer(self._context, endpoint, self._curve.guard(admits), [self._store])
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
        folders: list[PieceSource] = [
            FolderSource(
                folder,
                model.pieces,
                model=model.digest,
                stamps={name: Stamp(stamp.num_bytes, stamp.mtime_ns) for name, stamp in stamps.items()},
                list_file=model.list_file,
            )
            for folder, stamps in ((model.weights, model.weight_stamps), (model.skeleton, model.skeleton_stamps))
        ]
        self._server.sources = (*folders, self._store)

    def close(self) -> None:
        self._server.close()
        self._curve.close()
        self._context.destroy(0)


class ModelShare:
    """One model, for the workers of other hosts. `offer` before the rest."""

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

    def offer(self, say: Callable[[str], object]) -> None:
        """Cut the model into pieces, if that is not done yet: its files are read once. Raises PotluckError."""
        is_said = False

        def progress(done: int, total: int) -> None:
            nonlocal is_said
            if not is_said:
                is_said = True
                say(f"Reading {self._model.name} once, to share it with other hosts ({total / 1e6:,.0f} MB)")

        checksums = {Path(file.name).name: file.sha256 for file in self._model.files if file.sha256 is not None}
        self._offered = offer_model(self._model.path, self._model.name, shared_dir(), progress, checksums=checksums)
        self._giver.offer(self._offered)

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
        others = [
            PiecePeer(host.name, host.arrive.pieces, host.key) for host in self._pool.hosts() if host.arrive.pieces
        ]
        own = PiecePeer(self._here.name, self._giver.endpoint, self._pool.own_key)
        return SharedModel(name=self._model.name, digest=self._offered.digest, peers=(*others, own))
