"""A model source says where the workers of a ring get its model from: this host's store, or another host.

Of a model that lies on another host the head opens the metadata alone, and every worker gets its own tensors from
whoever has them, the head's workers like all others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from potluck.head.hosts import PoolHost
from potluck.head.models.search import ModelPeer, ModelRequest, ModelSearch, printable
from potluck.head.pool import Pool, PoolWorker
from potluck.head.progress import HeadProgress
from potluck.head.ring import RingStage
from potluck.host.local_host import ThisHost
from potluck.host.piece_cache import RemoteModelRecord, read_remote_record, write_remote_record
from potluck.host.piece_server import HostPieceServer, share_stored_model
from potluck.store.manifest import StoredFile, StoredModel
from potluck.system.byte_sizes import format_bytes
from potluck.system.paths import pieces_dir, shared_dir
from shard.formats.spec import ModelSpec
from shard.pieces.metadata import SharedFolders, read_complete_list, read_list
from shard.pieces.model_fetch import ModelFetcher, PieceFolders
from shard.pieces.open import open_checkpoint
from shard.pieces.piece_list import stage_pieces
from transport.errors import BadMessage, DeadlineExceeded, ModelNotFound, PotluckError
from transport.messages.pieces import PieceList
from transport.messages.pool import ModelOffered, OfferModel, OfferProgress, PieceHint, PiecePeer, SharedModel
from transport.pieces.assignment import assign_pieces
from transport.pieces.store import PieceStore, is_digest
from transport.timeouts import FALLBACK_AFTER_S, MODEL_SILENT_S, MODEL_STALLED_S, MODEL_WAIT_S

Say = Callable[[str], object]
_POLL_S = 0.2
_REPORT_INTERVAL_S = 15.0


class ModelSource(Protocol):
    """A model, and where its workers get it from."""

    def update_host(self, here: ThisHost) -> None:
        """The head's host has another address."""

    def prepare(self, say: Say, *, for_others: bool) -> StoredModel:
        """The model as it is to be loaded now; `for_others`: by workers of other hosts too. Raises PotluckError."""

    def share_for_worker(self, worker: PoolWorker) -> SharedModel | None:
        """For one that opens it without its weights; None if it lies on the worker's host."""

    def share_for_stages(self, stages: Sequence[RingStage]) -> Mapping[int, SharedModel]:
        """For all that load it at once, by the stage's number, without those on whose host it lies: what several hosts
        lack leaves the host that has it once."""


class LocalModel:
    """One model of this host's store. With a `piece_server`, workers of other hosts get its pieces from this host."""

    def __init__(
        self, model: StoredModel, here: ThisHost, pool: Pool, piece_server: HostPieceServer | None = None
    ) -> None:
        self._model = model
        self._here = here
        self._pool = pool
        self._piece_server = piece_server
        self._folders: SharedFolders | None = None

    def update_host(self, here: ThisHost) -> None:
        self._here = here
        if self._piece_server is not None:
            self._piece_server.update_host(here)

    def prepare(self, say: Say, *, for_others: bool) -> StoredModel:
        """`for_others`: cut into pieces, if that is not done yet: its files are read once."""
        if not for_others or self._piece_server is None:
            return self._model
        self._folders = share_stored_model(self._model, say)
        self._piece_server.share_model(self._folders)
        return self._model

    def share_for_worker(self, worker: PoolWorker) -> SharedModel | None:
        return self._shared() if worker.is_remote and self._piece_server is not None else None

    def share_for_stages(self, stages: Sequence[RingStage]) -> Mapping[int, SharedModel]:
        remote = [stage for stage in stages if stage.worker.is_remote]
        if self._folders is None or not remote:
            return {}
        hints = stage_hints(remote, self._folders.pieces, self._model.spec, self._pool)
        return {number: msgspec.structs.replace(self._shared(), hints=hint) for number, hint in hints.items()}

    def _shared(self) -> SharedModel:
        assert self._folders is not None and self._piece_server is not None, "prepared before it is loaded"
        peers = all_peers(self._pool, self._here, self._piece_server)
        return SharedModel(name=self._model.name, digest=self._folders.digest, peers=peers)


class RemoteModel:
    """One model that the head's store lacks. `find` before the rest."""

    def __init__(
        self, request: ModelRequest, here: ThisHost, piece_server: HostPieceServer, pool: Pool, run_dir: Path, say: Say
    ) -> None:
        self._request = request
        self._here = here
        self._piece_server = piece_server
        self._pool = pool
        self._run_dir = run_dir
        self._say = say
        self._last_error: PotluckError | None = None
        self._record: RemoteModelRecord | None = None
        self._model: StoredModel | None = None
        self._pieces: PieceList | None = None

    def update_host(self, here: ThisHost) -> None:
        """This host has another address."""
        self._here = here
        self._piece_server.update_host(here)

    def find(self) -> bool:
        """Wait for a host that has the model. Where none comes soon, what is here of it from an earlier time is used.
        False if it is to be pulled instead. Raises ModelNotFound, DeadlineExceeded."""
        known = read_remote_record(self._request.name)
        is_known = known is not None and read_complete_list(shared_dir() / known.digest, known.digest, for_engine=True)
        has_another_way = bool(is_known) or self._request.pull is not None
        search = ModelSearch(self._request, self._pool.hosts, self._say)
        self._say(
            f"{self._request.name} is not in this host's store: looking on paired hosts ({self._host_summary(search)})"
        )
        if not has_another_way:
            self._say("Ctrl-C ends it. What would help: potluck pull on this host or, on another one, potluck join")
        try:
            self._wait(search, FALLBACK_AFTER_S if has_another_way else MODEL_WAIT_S)
            return True
        except PotluckError:
            if not has_another_way:
                raise
        if not is_known or known is None:
            self._say(f"No host of the pool serves {self._request.name}: it is pulled")
            return False
        self._say(f"Going on with what is here of {self._request.name}, which came from {known.peer}")
        self._open_record(known)
        return True

    @property
    def has_peer(self) -> bool:
        """Whether the host is there that the model came from."""
        return self._record is not None and self._record.key in {host.key for host in self._pool.hosts.connected()}

    def wait_for_peer(self) -> None:
        """What is here of the model is not enough. Raises ModelNotFound, DeadlineExceeded."""
        peer_name = self._record.peer if self._record is not None else "a host"
        self._say(f"Waiting for {peer_name}, or another host that has {self._request.name} (Ctrl-C ends it)")
        self._wait(ModelSearch(self._request, self._pool.hosts, self._say), MODEL_WAIT_S)

    def prepare(self, say: Say, *, for_others: bool) -> StoredModel:
        """As a host that is connected has it now, if one does; else as it was."""
        assert self._model is not None, "found before it is loaded"
        search = ModelSearch(self._request, self._pool.hosts, lambda line: None)
        self._open_from_any(search.poll())
        return self._model

    def share_for_worker(self, worker: PoolWorker) -> SharedModel | None:
        return self._shared(self._digest)

    def share_for_stages(self, stages: Sequence[RingStage]) -> Mapping[int, SharedModel]:
        assert self._model is not None and self._pieces is not None
        hints = stage_hints(stages, self._pieces, self._model.spec, self._pool, without=self._peer_key)
        shared = self._shared(self._digest)
        return {number: msgspec.structs.replace(shared, hints=hint) for number, hint in hints.items()}

    @property
    def _peer_key(self) -> str:
        """Of the host that the model came from; empty before."""
        return self._record.key if self._record is not None else ""

    @property
    def _digest(self) -> str:
        assert self._record is not None, "found before it is loaded"
        return self._record.digest

    def _wait(self, search: ModelSearch, timeout_s: float) -> None:
        """Until the model is open. Raises ModelNotFound once all hosts are there and none has it, or why one that
        has it could not serve it."""
        give_up_at_s = time.monotonic() + timeout_s
        say_at_s = time.monotonic() + _REPORT_INTERVAL_S
        while not self._open_from_any(search.poll()):
            absent = search.absent_hosts()
            if search.queried_hosts and not absent:
                raise self._last_error or ModelNotFound(
                    f"{self._request.missing.message}; nor has any of the paired hosts: "
                    f"{', '.join(search.queried_hosts)}",
                    hint=f"{self._request.missing.hint}; or pull it on one of them",
                )
            now_s = time.monotonic()
            if now_s >= give_up_at_s:
                raise DeadlineExceeded(
                    f"no host that has {self._request.name} came within {timeout_s:.0f} s "
                    f"({self._host_summary(search)})",
                    hint=self._request.missing.hint,
                )
            if now_s >= say_at_s:
                say_at_s = now_s + 4 * _REPORT_INTERVAL_S
                self._say(f"Still waiting for a host that has {self._request.name} ({self._host_summary(search)})")
            time.sleep(_POLL_S)

    def _host_summary(self, search: ModelSearch) -> str:
        absent = search.absent_hosts()
        there = [host.name for host in self._pool.hosts.connected()]
        parts = [f"there: {', '.join(there)}"] if there else []
        if absent:
            parts.append(f"not there yet: {', '.join(absent)}")
        return "; ".join(parts) or "none is paired yet"

    def _open_from_any(self, peers: Sequence[ModelPeer]) -> bool:
        """From the first of them that serves it. One that was used before comes first."""
        for peer in sorted(peers, key=lambda peer: peer.host.key != self._peer_key):
            try:
                self._open_from(peer)
                return True
            except PotluckError as error:
                self._last_error = error
                why = printable(str(error))
                self._say(f"[yellow]{peer.host.name} could not serve {self._request.name}:[/yellow] {why}")
        return False

    def _open_from(self, model_peer: ModelPeer) -> None:
        host = model_peer.host
        offer_request = OfferModel(model=model_peer.model.name)
        (answer,) = self._pool.hosts.rpc.call_all(
            [(host, offer_request)],
            silence_s=MODEL_SILENT_S,
            on_progress=_OfferProgressReporter(self._request.name, self._say),
        )
        if isinstance(answer, PotluckError):
            raise answer
        if not isinstance(answer, ModelOffered) or not is_digest(answer.digest):
            got = "a digest that is none" if isinstance(answer, ModelOffered) else type(answer).__name__
            raise BadMessage(f"expected the model's digest from {host.name}, got {got}")
        record = RemoteModelRecord(name=self._request.name, digest=answer.digest, peer=host.name, key=host.key)
        if self._record == record and self._model is not None:
            return
        with zmq.Context() as context, closing(self._here.secure_endpoints(context, self._run_dir)) as edges:
            folders = PieceFolders(pieces=pieces_dir(), shared=shared_dir())
            shared = self._shared(record.digest, source_host=host)
            ModelFetcher(context, edges, folders).fetch_metadata(shared, for_engine=True)
        self._open_record(record)
        write_remote_record(record)
        self._say(f"{self._request.name} is on {host.name} ({format_bytes(model_peer.model.num_bytes)})")

    def _open_record(self, record: RemoteModelRecord) -> None:
        folder = shared_dir() / record.digest
        pieces = read_list(folder)
        checkpoint = open_checkpoint(folder, pieces=PieceStore(pieces_dir()))
        try:
            spec = checkpoint.spec
        finally:
            checkpoint.close()
        files = tuple(
            StoredFile(
                name=file.name, num_bytes=file.num_bytes, modified_ns=0, sha256=file.whole_sha256 or record.digest
            )
            for file in pieces.files
            if any(piece.tensor for piece in file.pieces)
        )
        self._record, self._pieces = record, pieces
        self._model = StoredModel(
            name=self._request.name, source=f"pool:{record.peer}", path=folder, files=files, spec=spec
        )

    def _shared(self, digest: str, *, source_host: PoolHost | None = None) -> SharedModel:
        """From all peers; the one that has all of it comes last."""
        last = source_host.key if source_host is not None else self._peer_key
        peers = all_peers(self._pool, self._here, self._piece_server, last=last)
        return SharedModel(name=self._request.name, digest=digest, peers=peers)


class _OfferProgressReporter:
    """Reports now and then how much of a model a host has hashed. Raises DeadlineExceeded if it makes no progress."""

    def __init__(self, name: str, say: Say) -> None:
        self._name = name
        self._say = say
        self._next_s = 0.0
        self._done_bytes = -1
        self._progress_s = 0.0

    def __call__(self, host: PoolHost, progress: OfferProgress) -> None:
        now_s = time.monotonic()
        if progress.done_bytes > self._done_bytes:
            self._done_bytes, self._progress_s = progress.done_bytes, now_s
        elif now_s - self._progress_s > MODEL_STALLED_S:
            raise DeadlineExceeded(
                f"{host.name} has read nothing more of {self._name} for {MODEL_STALLED_S:.0f} s",
                hint="is its disk busy, or does it share another model first?",
            )
        if now_s < self._next_s or not 0 <= progress.done_bytes <= progress.total_bytes:
            return
        self._next_s = now_s + _REPORT_INTERVAL_S
        share = f": {100 * progress.done_bytes / progress.total_bytes:.0f} %" if progress.total_bytes else ""
        self._say(f"{host.name} reads {self._name} once, to share it{share}")


def all_peers(pool: Pool, here: ThisHost, piece_server: HostPieceServer, *, last: str = "") -> tuple[PiecePeer, ...]:
    """The hosts that serve pieces, in the order in which workers ask them: this host is the last, or the one with the
    key `last`."""
    others = [PiecePeer(host.name, host.hello.pieces, host.key) for host in pool.hosts.with_pieces()]
    own = PiecePeer(here.name, piece_server.endpoint, pool.own_key)
    return tuple(sorted([*others, own], key=lambda peer: peer.key == last))


def stage_hints(
    stages: Sequence[RingStage], pieces: PieceList, spec: ModelSpec, pool: Pool, *, without: str = ""
) -> dict[int, tuple[PieceHint, ...]]:
    """By the stage's number, from whom its host best gets which pieces; none for the host with the key `without`,
    which has the model."""
    keys = {stage.index: pool.key_of(stage.worker) for stage in stages}
    needs: dict[str, set[int]] = {}
    for stage in stages:
        if keys[stage.index] != without:
            needs.setdefault(keys[stage.index], set()).update(stage_pieces(pieces, spec, stage.first, stage.last))
    sizes = [piece.num_bytes for file in pieces.files for piece in file.pieces]
    hints = assign_pieces({key: sorted(numbers) for key, numbers in needs.items()}, sizes)
    return {number: hints.get(key, ()) for number, key in keys.items()}


def find_model(
    model: StoredModel | ModelRequest,
    *,
    here: ThisHost,
    piece_server: HostPieceServer | None,
    pool: Pool,
    run_dir: Path,
    progress: HeadProgress,
) -> ModelSource:
    """`piece_server` is None where no other host can come. May wait long for a host that has the model.

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
    return LocalModel(model, here, pool, piece_server)
