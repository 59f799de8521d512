"""A pool on loopback: hosts with keys and stores, and models of random pieces."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import zmq

from transport.messages.pieces import LIST_VERSION, PART_BYTES, ListedFile, Piece, PieceList, PlacedPiece
from transport.messages.pool import PieceHint, PiecePeer, SharedModel
from transport.pieces.fetcher import FetchReport, fetch
from transport.pieces.piece_source import Located, PieceSource, StoreSource
from transport.pieces.server import PieceServer
from transport.pieces.store import PieceStore
from transport.security.curve import Curve, KeyPair, new_key_pair


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Model:
    """Random pieces of these sizes, and their list."""

    def __init__(self, *sizes: int, seed: int = 0) -> None:
        draw = random.Random(seed)
        self.contents = [draw.randbytes(size) for size in sizes]
        self.pieces = {index: Piece(digest_of(data), len(data)) for index, data in enumerate(self.contents)}
        placed: list[PlacedPiece] = []
        for piece in self.pieces.values():
            offset = placed[-1].offset + placed[-1].num_bytes if placed else 0
            placed.append(PlacedPiece(offset, piece.num_bytes, piece.digest, "a tensor"))
        file = ListedFile(name="model.safetensors", num_bytes=self.num_bytes, pieces=tuple(placed))
        self.list = PieceList(version=LIST_VERSION, model="random", format="safetensors", files=(file,))
        self.list_bytes = msgspec.json.encode(self.list)
        self.digest = digest_of(self.list_bytes)

    @property
    def num_bytes(self) -> int:
        return sum(len(data) for data in self.contents)

    def some(self, indexes: Collection[int]) -> dict[int, Piece]:
        return {index: self.pieces[index] for index in indexes}


@dataclass
class Host:
    """`context` is its process's."""

    name: str
    store: PieceStore
    keys: KeyPair = field(default_factory=new_key_pair)
    context: Any = field(default_factory=zmq.Context)
    curve: Curve = field(init=False)
    server: PieceServer | None = None

    def __post_init__(self) -> None:
        self.curve = Curve(self.context, self.keys)

    @property
    def peer(self) -> PiecePeer:
        assert self.server is not None
        return PiecePeer(self.name, self.server.endpoint, self.keys.public)

    def has(self, model: Model, indexes: Collection[int] | None = None) -> bool:
        """Byte for byte."""
        wanted = range(len(model.contents)) if indexes is None else indexes
        return all(
            self.store.has(model.pieces[index].digest)
            and self.store.path(model.pieces[index].digest).read_bytes() == model.contents[index]
            for index in wanted
        )

    def fetch(
        self,
        model: Model,
        peers: Sequence[PiecePeer],
        *,
        pieces: Mapping[int, Piece] | None = None,
        hints: Sequence[PieceHint] = (),
        **options: Any,
    ) -> FetchReport:
        return fetch(
            model.pieces if pieces is None else pieces,
            self.store,
            SharedModel(name="model random", digest=model.digest, peers=tuple(peers), hints=tuple(hints)),
            curve=self.curve,
            context=self.context,
            **options,
        )

    def close(self) -> None:
        if self.server is not None:
            self.server.close()
        self.curve.close()
        self.context.destroy(0)


class Pool:
    """`members` are the keys that every server admits."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self.members: set[str] = set()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def host(self, name: str, model: Model | None = None, indexes: Collection[int] | None = None) -> Host:
        """A member that has the model's list, and these of its pieces: all of them by default."""
        host = Host(name, PieceStore(self._folder / name))
        self._stack.callback(host.close)
        self.members.add(host.keys.public)
        if model is not None:
            host.store.put(model.list_bytes, model.digest)
            for index in range(len(model.contents)) if indexes is None else indexes:
                host.store.put(model.contents[index], model.pieces[index].digest)
        return host

    def server(
        self,
        name: str,
        model: Model | None = None,
        indexes: Collection[int] | None = None,
        *,
        sources: Sequence[PieceSource] | None = None,
        admits: Callable[[str], bool] | None = None,
    ) -> Host:
        """A host like that, which also gives them."""
        host = self.host(name, model, indexes)
        self.serve(host, sources=sources, admits=admits)
        return host

    def serve(
        self,
        host: Host,
        endpoint: str = "tcp://127.0.0.1:*",
        *,
        sources: Sequence[PieceSource] | None = None,
        admits: Callable[[str], bool] | None = None,
    ) -> PieceServer:
        guard = host.curve.guard(admits or self.members.__contains__)
        host.server = PieceServer(
            host.context, endpoint, guard, [StoreSource(host.store)] if sources is None else sources
        )
        return host.server


SMALL = Model(3 * PART_BYTES + 5, 1, 1000, PART_BYTES, 2 * PART_BYTES)


def sent_bytes(*hosts: Host) -> int:
    return sum(host.server.sent_bytes for host in hosts if host.server is not None)


def spoil(host: Host, piece: Piece) -> None:
    """One bit."""
    path = host.store.path(piece.digest)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


class Behind(StoreSource):
    """Answers nothing until then: who connects sooner makes no difference."""

    def __init__(self, store: PieceStore, then: threading.Event) -> None:
        super().__init__(store)
        self._then = then

    def locate(self, digest: str) -> Located | None:
        assert self._then.wait(120.0)
        return super().locate(digest)
