"""What a host tells its head of the models of its own store, and how it comes to give one of them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from rich.markup import escape

from potluck.model_share import PieceGiver, offer_stored
from potluck.store import Store, StoredModel
from transport.errors import ModelNotFound, PotluckError
from transport.pieces.store import is_digest
from transport.pool_messages import (
    AskFiles,
    AskModels,
    AskOffer,
    HostAnswer,
    HostFault,
    HostFile,
    HostModel,
    HostModels,
    HostQuestion,
    Offered,
    Preparing,
)

MAX_MODELS = 500
MAX_NAME_CHARACTERS = 256
_MAX_ASKED_AT_ONCE = 16
_NEWS_EVERY_S = 0.5
log = logging.getLogger("potluck.guest")

Send = Callable[[HostAnswer | Preparing], object]


class HostAnswers:
    """Of a host whose store is `store`; what it offers is given by `giver`, and `say` tells its user.

    Whoever asks may be answered from another thread, and late: a model is read once in full before it can be offered.
    """

    def __init__(self, store: Store, giver: PieceGiver, *, say: Callable[[str], object]) -> None:
        self._store = store
        self._giver = giver
        self._say = say
        self._offering = threading.Lock()
        self._given: set[str] = set()
        self._places = threading.BoundedSemaphore(_MAX_ASKED_AT_ONCE)

    def hear(self, question: HostQuestion, send: Send) -> None:
        """Does not wait. More questions at once than a head has are not answered."""
        if self._places.acquire(blocking=False):
            threading.Thread(target=self._answer, args=(question, send), name="answers", daemon=True).start()

    def _answer(self, question: HostQuestion, send: Send) -> None:
        try:
            send(self._answer_to(question, send))
        except PotluckError as error:
            send(HostFault(question.token, error.code, error.message, error.hint))
        except Exception as error:
            log.exception("a question of the head could not be answered")
            send(HostFault(question.token, PotluckError.code, f"{type(error).__name__}: {error}"))
        finally:
            self._places.release()

    def _answer_to(self, question: HostQuestion, send: Send) -> HostAnswer:
        match question:
            case AskModels(token=token):
                return HostModels(token, tuple(map(_told, self._models()[:MAX_MODELS])))
            case AskOffer():
                return self._offered(question, send)
            case AskFiles(token=token, sha256=sha256):
                return HostFile(token, self._file_bytes(sha256))

    def _models(self) -> list[StoredModel]:
        return [model for model in self._store.list() if model.is_present and len(model.name) <= MAX_NAME_CHARACTERS]

    def _offered(self, question: AskOffer, send: Send) -> Offered:
        found = [model for model in self._models() if model.name == question.model]
        if not found:
            raise ModelNotFound(f"this host has no model {question.model[:MAX_NAME_CHARACTERS]!r}")
        while not self._offering.acquire(timeout=_NEWS_EVERY_S):  # Another one is being read.
            send(Preparing(question.token, 0, 0))
        try:
            model = self._store.resolve(found[0].name)
            offered = offer_stored(model, self._telling(question, send))
            self._giver.offer(offered)
            if offered.digest not in self._given:
                self._given.add(offered.digest)
                self._say(f"Giving {escape(model.name)} to the pool")
        finally:
            self._offering.release()
        return Offered(question.token, offered.digest, model.num_bytes)

    def _telling(self, question: AskOffer, send: Send) -> Callable[[int, int], None]:
        next_s = 0.0

        def tell(done: int, total: int) -> None:
            nonlocal next_s
            if not next_s:
                name = escape(question.model)
                self._say(f"Reading {name} once, to share it with other hosts ({total / 1e6:,.0f} MB)")
            if time.monotonic() >= next_s:
                next_s = time.monotonic() + _NEWS_EVERY_S
                send(Preparing(question.token, done, total))

        return tell

    def _file_bytes(self, sha256: str) -> int:
        """Of the file with that checksum, which is given from now on; 0 if there is none."""
        if not is_digest(sha256):
            return 0
        for path in self._store.copies(sha256):
            try:
                return self._giver.offer_file(sha256, path)
            except OSError as error:
                log.warning("%s can't be given: %s", path, error)
        return 0


def _told(model: StoredModel) -> HostModel:
    """A path says something about this host, and would be of no use elsewhere."""
    source = "" if model.source.startswith("file:") or len(model.source) > MAX_NAME_CHARACTERS else model.source
    return HostModel(model.name, source, model.num_bytes)
