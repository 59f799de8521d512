"""A model that lies on another host of the pool: the head opens it without its weights, and every worker gets its own
tensors from whoever has them, the head's workers like all others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import zmq

from potluck.head.hosts import PoolHost, piece_peers
from potluck.head.models.search import ModelPeer, ModelRequest, ModelSearch, printable
from potluck.head.pool import Pool, PoolWorker
from potluck.head.ring import RingStage
from potluck.host.local_host import ThisHost
from potluck.host.piece_cache import RemoteModelRecord, read_remote_record, write_remote_record
from potluck.host.piece_server import HostPieceServer
from potluck.store.manifest import StoredFile, StoredModel
from potluck.system.paths import pieces_dir, shared_dir
from shard.pieces.metadata import read_complete_list, read_list
from shard.pieces.model_fetch import ModelFetcher, PieceFolders
from shard.pieces.open import open_checkpoint
from shard.pieces.piece_list import stage_pieces
from transport.errors import BadMessage, DeadlineExceeded, ModelNotFound, PotluckError
from transport.messages.pieces import PieceList
from transport.messages.pool import ModelOffered, OfferModel, OfferProgress, PiecePeer, SharedModel
from transport.pieces.assignment import assign_pieces
from transport.pieces.store import PieceStore, is_digest
from transport.timeouts import FALLBACK_AFTER_S, MODEL_SILENT_S, MODEL_STALLED_S, MODEL_WAIT_S

Say = Callable[[str], object]
_POLL_S = 0.2
_REPORT_INTERVAL_S = 15.0


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
        """Wait for a host that has the model. Where nobody comes soon, what is known of it from an earlier time will
        do. False if it is to be pulled instead. Raises ModelNotFound, DeadlineExceeded."""
        known = read_remote_record(self._request.name)
        is_known = known is not None and read_complete_list(shared_dir() / known.digest, known.digest, for_engine=True)
        has_another_way = bool(is_known) or self._request.pull is not None
        search = ModelSearch(self._request, self._pool.hosts, self._say)
        self._say(
            f"{self._request.name} is not in this host's store: asking the paired hosts ({self._host_summary(search)})"
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
            self._say(f"No host of the pool gives {self._request.name}: it is pulled")
            return False
        self._say(f"Going on with what is here of {self._request.name}, which came from {known.lender}")
        self._open_record(known)
        return True

    @property
    def has_peer(self) -> bool:
        """Whether the host is there that the model came from."""
        return self._record is not None and self._record.key in {host.key for host in self._pool.hosts.connected()}

    def wait_for_peer(self) -> None:
        """What is here does not do. Raises ModelNotFound, DeadlineExceeded."""
        peer_name = self._record.lender if self._record is not None else "a host"
        self._say(f"Waiting for {peer_name}, or another host that has {self._request.name} (Ctrl-C ends it)")
        self._wait(ModelSearch(self._request, self._pool.hosts, self._say), MODEL_WAIT_S)

    def prepare(self, say: Say, *, for_others: bool) -> StoredModel:
        """The model that is to be loaded now: as a host that is there has it, if one does; else as it was."""
        assert self._model is not None, "found before it is loaded"
        search = ModelSearch(self._request, self._pool.hosts, lambda line: None)
        self._open_from_any(search.poll())
        return self._model

    def share_for_worker(self, worker: PoolWorker) -> SharedModel | None:
        """To open the model without its weights."""
        return self._shared(self._digest)

    def share_for_stages(self, stages: Sequence[RingStage]) -> Mapping[int, SharedModel]:
        """To load them all at once, by the stage's number: what several hosts lack leaves the lender once."""
        assert self._model is not None and self._pieces is not None
        needs: dict[str, set[int]] = {}
        source_key = self._record.key if self._record is not None else ""
        for stage in stages:
            key = self._pool.key_of(stage.worker)
            if key != source_key:
                needed = stage_pieces(self._pieces, self._model.spec, stage.first, stage.last)
                needs.setdefault(key, set()).update(needed)
        sizes = [piece.num_bytes for file in self._pieces.files for piece in file.pieces]
        hints = assign_pieces({key: sorted(numbers) for key, numbers in needs.items()}, sizes)
        shared = self._shared(self._digest)
        return {
            stage.index: msgspec.structs.replace(shared, hints=hints.get(self._pool.key_of(stage.worker), ()))
            for stage in stages
        }

    @property
    def _digest(self) -> str:
        assert self._record is not None, "found before it is loaded"
        return self._record.digest

    def _wait(self, search: ModelSearch, timeout_s: float) -> None:
        """Until the model is borrowed. Raises ModelNotFound once all hosts are there and none has it, or why one that
        has it could not give it."""
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
        """From the first of them that gives it. One that was used before comes first."""
        before = self._record.key if self._record is not None else ""
        for lender in sorted(peers, key=lambda lender: lender.host.key != before):
            try:
                self._open_from(lender)
            except PotluckError as error:
                self._last_error = error
                self._say(
                    f"[yellow]{lender.host.name} could not give {self._request.name}:[/yellow] {printable(str(error))}"
                )
                continue
            return True
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
            raise BadMessage(f"{host.name} did not answer with a model")
        record = RemoteModelRecord(name=self._request.name, digest=answer.digest, lender=host.name, key=host.key)
        if self._record == record and self._model is not None:
            return
        with zmq.Context() as context, closing(self._here.secure_endpoints(context, self._run_dir)) as edges:
            folders = PieceFolders(pieces=pieces_dir(), shared=shared_dir())
            shared = self._shared(record.digest, source_host=host)
            ModelFetcher(context, edges, folders).fetch_metadata(shared, for_engine=True)
        self._open_record(record)
        write_remote_record(record)
        self._say(f"{self._request.name} is on {host.name} ({model_peer.model.num_bytes / 1e6:,.0f} MB)")

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
            name=self._request.name, source=f"pool:{record.lender}", path=folder, files=files, spec=spec
        )

    def _shared(self, digest: str, *, source_host: PoolHost | None = None) -> SharedModel:
        """From whoever is there; the lender is the last that is asked, since it has all of it."""
        key = source_host.key if source_host is not None else self._record.key if self._record is not None else ""
        own = PiecePeer(self._here.name, self._piece_server.endpoint, self._pool.own_key)
        peers = sorted([*piece_peers(self._pool.hosts), own], key=lambda peer: peer.key == key)
        return SharedModel(name=self._request.name, digest=digest, peers=tuple(peers))


class _OfferProgressReporter:
    """Says now and then how far a host is that reads a model. Raises DeadlineExceeded where it gets no further."""

    def __init__(self, name: str, say: Say) -> None:
        self._name = name
        self._say = say
        self._next_s = 0.0
        self._done_bytes = -1
        self._progress_s = 0.0

    def __call__(self, host: PoolHost, news: OfferProgress) -> None:
        now_s = time.monotonic()
        if news.done_bytes > self._done_bytes:
            self._done_bytes, self._progress_s = news.done_bytes, now_s
        elif now_s - self._progress_s > MODEL_STALLED_S:
            raise DeadlineExceeded(
                f"{host.name} has read nothing more of {self._name} for {MODEL_STALLED_S:.0f} s",
                hint="is its disk busy, or does it share another model first?",
            )
        if now_s < self._next_s or not 0 <= news.done_bytes <= news.total_bytes:
            return
        self._next_s = now_s + _REPORT_INTERVAL_S
        share = f": {100 * news.done_bytes / news.total_bytes:.0f} %" if news.total_bytes else ""
        self._say(f"{host.name} reads {self._name} once, to share it{share}")
