"""A model that lies on another host of the pool: the head opens it without its weights, and every worker gets its own
tensors from whoever has them, the head's workers like all others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import zmq

from potluck.borrowed_record import BorrowedRecord, read_borrowed, write_borrowed
from potluck.lan import ThisHost
from potluck.model_share import PieceGiver, piece_peers
from potluck.paths import pieces_dir, shared_dir
from potluck.pool import Pool, PoolWorker
from potluck.pool_hosts import PoolHost
from potluck.ring import RingStage
from potluck.store import StoredModel
from potluck.store.manifest import StoredFile
from potluck.wanted_model import Lender, ModelSearch, WantedModel, shown
from shard.model_fetch import ModelFetch, PieceFolders
from shard.needed_pieces import stage_pieces
from shard.open import open_checkpoint
from shard.shared_model import read_list, whole_list
from transport.errors import BadMessage, DeadlineExceeded, ModelNotFound, PotluckError
from transport.pieces.piece import PieceList
from transport.pieces.sources import share_hints
from transport.pieces.store import PieceStore, is_digest
from transport.pool_messages import AskOffer, Offered, PiecePeer, Preparing, SharedModel

Say = Callable[[str], object]
ELSEWHERE_WITHIN_S = 6.0
"""A paired host that runs comes by itself within a few seconds; after that another way is taken, if there is one."""

WAIT_S = 3600.0
_SILENT_AFTER_S = 60.0
_STANDS_STILL_S = 300.0
_LOOK_EVERY_S = 0.2
_SAY_EVERY_S = 15.0


class BorrowedModel:
    """One model that the head's store lacks. `find` before the rest."""

    def __init__(
        self, wanted: WantedModel, here: ThisHost, giver: PieceGiver, pool: Pool, run_dir: Path, say: Say
    ) -> None:
        self._wanted = wanted
        self._here = here
        self._giver = giver
        self._pool = pool
        self._run_dir = run_dir
        self._say = say
        self._refused: PotluckError | None = None
        self._record: BorrowedRecord | None = None
        self._model: StoredModel | None = None
        self._pieces: PieceList | None = None

    def moved(self, here: ThisHost) -> None:
        """This host has another address."""
        self._here = here
        self._giver.moved(here)

    def find(self) -> bool:
        """Wait for a host that has the model. Where nobody comes soon, what is known of it from an earlier time will
        do. False if it is to be pulled instead. Raises ModelNotFound, DeadlineExceeded."""
        known = read_borrowed(self._wanted.name)
        is_known = known is not None and whole_list(shared_dir() / known.digest, known.digest, for_engine=True)
        has_another_way = bool(is_known) or self._wanted.pull is not None
        search = ModelSearch(self._wanted, self._pool.hosts, self._say)
        self._say(f"{self._wanted.name} is not in this host's store: asking the paired hosts ({self._who(search)})")
        if not has_another_way:
            self._say("Ctrl-C ends it. What would help: potluck pull on this host or, on another one, potluck join")
        try:
            self._wait(search, ELSEWHERE_WITHIN_S if has_another_way else WAIT_S)
            return True
        except PotluckError:
            if not has_another_way:
                raise
        if not is_known or known is None:
            self._say(f"No host of the pool gives {self._wanted.name}: it is pulled")
            return False
        self._say(f"Going on with what is here of {self._wanted.name}, which came from {known.lender}")
        self._use(known)
        return True

    @property
    def has_lender(self) -> bool:
        """Whether the host is there that the model came from."""
        return self._record is not None and self._record.key in {host.key for host in self._pool.hosts.all()}

    def wait_for_lender(self) -> None:
        """What is here does not do. Raises ModelNotFound, DeadlineExceeded."""
        lender = self._record.lender if self._record is not None else "a host"
        self._say(f"Waiting for {lender}, or another host that has {self._wanted.name} (Ctrl-C ends it)")
        self._wait(ModelSearch(self._wanted, self._pool.hosts, self._say), WAIT_S)

    def ready(self, say: Say, *, for_others: bool) -> StoredModel:
        """The model that is to be loaded now: as a host that is there has it, if one does; else as it was."""
        assert self._model is not None, "found before it is loaded"
        search = ModelSearch(self._wanted, self._pool.hosts, lambda line: None)
        self._borrowed_from(search.look())
        return self._model

    def for_worker(self, worker: PoolWorker) -> SharedModel | None:
        """To open the model without its weights."""
        return self._shared(self._digest)

    def for_stages(self, stages: Sequence[RingStage]) -> Mapping[int, SharedModel]:
        """To load them all at once, by the stage's number: what several hosts lack leaves the lender once."""
        assert self._model is not None and self._pieces is not None
        needs: dict[str, set[int]] = {}
        lender = self._record.key if self._record is not None else ""
        for stage in stages:
            key = self._pool.key_of(stage.worker)
            if key != lender:
                needed = stage_pieces(self._pieces, self._model.spec, stage.first, stage.last)
                needs.setdefault(key, set()).update(needed)
        sizes = [piece.num_bytes for file in self._pieces.files for piece in file.pieces]
        hints = share_hints({key: sorted(numbers) for key, numbers in needs.items()}, sizes)
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
        say_at_s = time.monotonic() + _SAY_EVERY_S
        while not self._borrowed_from(search.look()):
            absent = search.absent()
            if search.asked and not absent:
                raise self._refused or ModelNotFound(
                    f"{self._wanted.missing.message}; nor has any of the paired hosts: {', '.join(search.asked)}",
                    hint=f"{self._wanted.missing.hint}; or pull it on one of them",
                )
            now_s = time.monotonic()
            if now_s >= give_up_at_s:
                raise DeadlineExceeded(
                    f"no host that has {self._wanted.name} came within {timeout_s:.0f} s ({self._who(search)})",
                    hint=self._wanted.missing.hint,
                )
            if now_s >= say_at_s:
                say_at_s = now_s + 4 * _SAY_EVERY_S
                self._say(f"Still waiting for a host that has {self._wanted.name} ({self._who(search)})")
            time.sleep(_LOOK_EVERY_S)

    def _who(self, search: ModelSearch) -> str:
        absent = search.absent()
        there = [host.name for host in self._pool.hosts.all()]
        parts = [f"there: {', '.join(there)}"] if there else []
        if absent:
            parts.append(f"not there yet: {', '.join(absent)}")
        return "; ".join(parts) or "none is paired yet"

    def _borrowed_from(self, lenders: Sequence[Lender]) -> bool:
        """From the first of them that gives it. One that was used before comes first."""
        before = self._record.key if self._record is not None else ""
        for lender in sorted(lenders, key=lambda lender: lender.host.key != before):
            try:
                self._borrow(lender)
            except PotluckError as error:
                self._refused = error
                self._say(
                    f"[yellow]{lender.host.name} could not give {self._wanted.name}:[/yellow] {shown(str(error))}"
                )
                continue
            return True
        return False

    def _borrow(self, lender: Lender) -> None:
        host = lender.host
        ask = AskOffer(model=lender.model.name)
        (answer,) = self._pool.hosts.questions.ask(
            [(host, ask)], silence_s=_SILENT_AFTER_S, on_news=_Telling(self._wanted.name, self._say)
        )
        if isinstance(answer, PotluckError):
            raise answer
        if not isinstance(answer, Offered) or not is_digest(answer.digest):
            raise BadMessage(f"{host.name} did not answer with a model")
        record = BorrowedRecord(name=self._wanted.name, digest=answer.digest, lender=host.name, key=host.key)
        if self._record == record and self._model is not None:
            return
        with zmq.Context() as context, closing(self._here.edges(context, self._run_dir)) as edges:
            folders = PieceFolders(pieces=pieces_dir(), shared=shared_dir())
            shared = self._shared(record.digest, lender=host)
            ModelFetch(context, edges, folders).skeleton(shared, for_engine=True)
        self._use(record)
        write_borrowed(record)
        self._say(f"{self._wanted.name} is on {host.name} ({lender.model.num_bytes / 1e6:,.0f} MB)")

    def _use(self, record: BorrowedRecord) -> None:
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
            name=self._wanted.name, source=f"pool:{record.lender}", path=folder, files=files, spec=spec
        )

    def _shared(self, digest: str, *, lender: PoolHost | None = None) -> SharedModel:
        """From whoever is there; the lender is the last that is asked, since it has all of it."""
        key = lender.key if lender is not None else self._record.key if self._record is not None else ""
        own = PiecePeer(self._here.name, self._giver.endpoint, self._pool.own_key)
        peers = sorted([*piece_peers(self._pool.hosts), own], key=lambda peer: peer.key == key)
        return SharedModel(name=self._wanted.name, digest=digest, peers=tuple(peers))


class _Telling:
    """Says now and then how far a host is that reads a model. Raises DeadlineExceeded where it gets no further."""

    def __init__(self, name: str, say: Say) -> None:
        self._name = name
        self._say = say
        self._next_s = 0.0
        self._done_bytes = -1
        self._grew_s = 0.0

    def __call__(self, host: PoolHost, news: Preparing) -> None:
        now_s = time.monotonic()
        if news.done_bytes > self._done_bytes:
            self._done_bytes, self._grew_s = news.done_bytes, now_s
        elif now_s - self._grew_s > _STANDS_STILL_S:
            raise DeadlineExceeded(
                f"{host.name} has read nothing more of {self._name} for {_STANDS_STILL_S:.0f} s",
                hint="is its disk busy, or does it share another model first?",
            )
        if now_s < self._next_s or not 0 <= news.done_bytes <= news.total_bytes:
            return
        self._next_s = now_s + _SAY_EVERY_S
        share = f": {100 * news.done_bytes / news.total_bytes:.0f} %" if news.total_bytes else ""
        self._say(f"{host.name} reads {self._name} once, to share it{share}")
