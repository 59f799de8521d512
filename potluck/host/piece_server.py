"""This host's piece server, and its replies to the head about the models of its own store."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq
from rich.markup import escape

from potluck.host.local_host import ThisHost
from potluck.store.manifest import StoredModel
from potluck.store.store import Store
from potluck.system.byte_sizes import format_bytes
from potluck.system.paths import pieces_dir, shared_dir
from shard.pieces.cut_files import HashProgress
from shard.pieces.metadata import SharedFolders, share_model
from transport.errors import Busy, ErrorInfo, ModelNotFound, PotluckError
from transport.links.endpoints import port_of, tcp_endpoint
from transport.messages.pool import (
    FindFile,
    HostFault,
    HostFile,
    HostModel,
    HostModels,
    HostReply,
    HostRequest,
    ListHostModels,
    ModelOffered,
    OfferModel,
    OfferProgress,
)
from transport.pieces.piece_source import FolderSource, PieceSource, StoreSource, WholeFiles
from transport.pieces.server import PieceServer
from transport.pieces.store import PieceStore, is_digest
from transport.security.curve import Authorizer, Curve

_IO_THREADS = 2
_MAX_SHARED = 8


class HostPieceServer:
    """This host's piece server, in a context of its own: members of the pool get from it what they lack."""

    def __init__(self, here: ThisHost, endpoint: str, is_authorized: Authorizer) -> None:
        """Raises ConfigError if it can't listen at `endpoint`."""
        assert here.keys is not None and here.address is not None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(_IO_THREADS)
        self._curve = Curve(self._context, here.keys)
        self._store = StoreSource(PieceStore(pieces_dir()))
        self._files = WholeFiles()
        self._lock = threading.Lock()
        self._shared: dict[str, tuple[PieceSource, ...]] = {}
        sources: list[PieceSource] = [self._files, self._store]
        try:
            self._server = PieceServer(self._context, endpoint, self._curve.guard(is_authorized), sources)
        except BaseException:
            self._curve.close()
            self._context.destroy(0)
            raise
        # It may listen at every address; others reach it at one.
        self.endpoint = tcp_endpoint(here.address, port_of(self._server.endpoint))

    def update_host(self, here: ThisHost) -> None:
        assert here.address is not None
        self.endpoint = tcp_endpoint(here.address, port_of(self._server.endpoint))

    @property
    def sent_bytes(self) -> int:
        """Of pieces, since it was started."""
        return self._server.sent_bytes

    def share_model(self, model: SharedFolders) -> None:
        """Serve pieces of that model too, from where its files lie."""
        folders: tuple[PieceSource, ...] = tuple(
            FolderSource(
                folder,
                model.pieces,
                model=model.digest,
                stamps=stamps,
                list_file=model.list_file,
            )
            for folder, stamps in ((model.weights, model.weight_stamps), (model.metadata, model.metadata_stamps))
        )
        with self._lock:
            self._shared.pop(model.digest, None)
            self._shared[model.digest] = folders
            while len(self._shared) > _MAX_SHARED:
                del self._shared[next(iter(self._shared))]
            folders = tuple(source for sources in self._shared.values() for source in sources)
            self._server.sources = (*folders, self._files, self._store)

    def share_file(self, sha256: str, path: Path) -> int:
        """Serve the whole file with that checksum too; returns how many bytes it has. Raises OSError."""
        return self._files.add(sha256, path)

    def close(self) -> None:
        self._server.close()
        self._curve.close()
        self._context.destroy(0)


def share_stored_model(
    model: StoredModel, say: Callable[[str], object], on_progress: HashProgress = lambda done, total: None
) -> SharedFolders:
    """Cut that model of the store into pieces: its files are read, which `say` announces, unless they were before.
    Raises PotluckError."""
    is_announced = False

    def progress(done: int, total: int) -> None:
        nonlocal is_announced
        if not is_announced:
            say(f"Reading {escape(model.name)} once, to share it with other hosts ({format_bytes(total)})")
        is_announced = True
        on_progress(done, total)

    checksums = {Path(file.name).name: file.sha256 for file in model.files if file.sha256 is not None}
    return share_model(model.path, model.name, shared_dir(), progress, checksums=checksums)


MAX_MODELS = 500
MAX_NAME_CHARACTERS = 256
_MAX_CONCURRENT_REQUESTS = 16
_PROGRESS_INTERVAL_S = 0.5
log = logging.getLogger("potluck.host.member")

Send = Callable[[HostReply | OfferProgress], object]


class HostModelService:
    """Replies to the head about the models of this host's `store`; `piece_server` serves what is offered, and `say`
    tells this host's user.

    A reply may come from another thread, and late: a model is read once in full before it can be offered.
    """

    def __init__(self, store: Store, piece_server: HostPieceServer, *, say: Callable[[str], object]) -> None:
        self._store = store
        self._piece_server = piece_server
        self._say = say
        self._sharing = threading.Lock()
        self._announced: set[str] = set()
        self._slots = threading.BoundedSemaphore(_MAX_CONCURRENT_REQUESTS)

    def on_request(self, request: HostRequest, send: Send) -> None:
        """Does not wait. More requests at once than a head has are refused."""
        if self._slots.acquire(blocking=False):
            threading.Thread(target=self._reply, args=(request, send), name="replies", daemon=True).start()
        else:
            text = f"expected at most {_MAX_CONCURRENT_REQUESTS} requests at once"
            send(HostFault(request.token, ErrorInfo(Busy.code, text, "try again when one of them has been answered")))

    def _reply(self, request: HostRequest, send: Send) -> None:
        try:
            send(self._reply_to(request, send))
        except PotluckError as error:
            send(HostFault(request.token, ErrorInfo.of(error)))
        except Exception as error:
            log.exception("a request of the head has failed")
            send(HostFault(request.token, ErrorInfo.of(error)))
        finally:
            self._slots.release()

    def _reply_to(self, request: HostRequest, send: Send) -> HostReply:
        match request:
            case ListHostModels(token=token):
                return HostModels(token, tuple(map(_host_model, self._models()[:MAX_MODELS])))
            case OfferModel():
                return self._share(request, send)
            case FindFile(token=token, sha256=sha256):
                return HostFile(token, self._file_bytes(sha256))

    def _models(self) -> list[StoredModel]:
        return [model for model in self._store.list() if model.is_present and len(model.name) <= MAX_NAME_CHARACTERS]

    def _share(self, request: OfferModel, send: Send) -> ModelOffered:
        found = [model for model in self._models() if model.name == request.model]
        if not found:
            raise ModelNotFound(f"this host has no model {request.model[:MAX_NAME_CHARACTERS]!r}")
        while not self._sharing.acquire(timeout=_PROGRESS_INTERVAL_S):  # Another one is being read.
            send(OfferProgress(request.token, 0, 0))
        try:
            model = self._store.resolve(found[0].name)
            offered = share_stored_model(model, self._say, _progress_sender(request, send))
            self._piece_server.share_model(offered)
            if offered.digest not in self._announced:
                self._announced.add(offered.digest)
                self._say(f"Sharing {escape(model.name)} with the pool")
        finally:
            self._sharing.release()
        return ModelOffered(request.token, offered.digest, model.num_bytes)

    def _file_bytes(self, sha256: str) -> int:
        """Of the file with that checksum, which is served from now on; 0 if there is none."""
        if not is_digest(sha256):
            return 0
        for path in self._store.local_copies(sha256):
            try:
                return self._piece_server.share_file(sha256, path)
            except OSError as error:
                log.warning("%s can't be served: %s", path, error)
        return 0


def _host_model(model: StoredModel) -> HostModel:
    """Without a path as its source: that reveals something about this host, and is of no use elsewhere."""
    source = "" if model.source.startswith("file:") or len(model.source) > MAX_NAME_CHARACTERS else model.source
    return HostModel(model.name, source, model.num_bytes)


def _progress_sender(request: OfferModel, send: Send) -> HashProgress:
    """Sends how far hashing is every `_PROGRESS_INTERVAL_S`: the head takes a host for silent otherwise."""
    next_s = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            next_s = time.monotonic() + _PROGRESS_INTERVAL_S
            send(OfferProgress(request.token, done, total))

    return progress
