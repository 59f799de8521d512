"""The search finds models and files on the other hosts of a pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msgspec import Struct
from rich.markup import escape

from potluck.head.hosts import PoolHost, PoolHosts
from potluck.host.piece_server import MAX_NAME_CHARACTERS
from potluck.store.manifest import StoredModel
from potluck.store.sources import ProgressCallback as PullCallback
from potluck.store.sources import check_name, looks_like_path, parse_source
from transport.errors import ModelNotFound, PotluckError
from transport.messages.pool import FindFile, HostFile, HostModel, HostModels, ListHostModels
from transport.pieces.store import is_digest
from transport.timeouts import FIND_FILE_S, HOST_REPLY_S

_MAX_MODELS = 1000
_MAX_MODEL_BYTES = 1 << 44
_MAX_LISTED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """`text` is what the user typed, `name` what the model is called, `missing` why it is not here. `pull` gets it
    without the pool; None if nobody knows from where."""

    text: str
    name: str
    source: str
    missing: PotluckError
    pull: Callable[[PullCallback], StoredModel] | None = None

    def matches(self, model: HostModel) -> bool:
        return model.name in (self.text, self.name) or bool(self.source and model.source == self.source)


def request_model(
    text: str, missing: PotluckError, pull: Callable[[PullCallback], StoredModel] | None
) -> ModelRequest | None:
    """None for what other hosts can't know by that name: a path, or no name at all. `pull` is kept if the text names
    a source."""
    if looks_like_path(text) or text.startswith("file:"):
        return None
    try:
        source = parse_source(text)
        name, source_text, known = source.name, source.text, True
    except PotluckError:
        name, source_text, known = text, "", False
    try:
        check_name(name)
    except ModelNotFound:
        return None
    return ModelRequest(text=text, name=name, source=source_text, missing=missing, pull=pull if known else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPeer:
    """A host that has the model, under the name that its own store has for it."""

    host: PoolHost
    model: HostModel


class ModelSearch:
    """Queries hosts as they connect, each once; `say` shows the user what each of them has."""

    def __init__(self, request: ModelRequest, hosts: PoolHosts, say: Callable[[str], object]) -> None:
        self._request = request
        self._hosts = hosts
        self._say = say
        self._queried: dict[bytes, str] = {}

    def poll(self) -> list[ModelPeer]:
        """Those that have it among the hosts not queried yet. Waits for their replies, some seconds at most."""
        hosts = [host for host in self._hosts.with_pieces() if host.peer.identity not in self._queried]
        if not hosts:
            return []
        answers = self._hosts.rpc.call_all([(host, ListHostModels()) for host in hosts], silence_s=HOST_REPLY_S)
        found: list[ModelPeer] = []
        for host, answer in zip(hosts, answers, strict=True):
            self._queried[host.peer.identity] = host.name
            if not isinstance(answer, HostModels):
                why = answer.message if isinstance(answer, PotluckError) else f"it sent {type(answer).__name__}"
                self._say(f"[yellow]{host.name} did not list its models:[/yellow] {printable(why)}")
                continue
            models = plausible_models(answer)
            meant = [model for model in models if self._request.matches(model)]
            if meant:
                found.append(ModelPeer(host=host, model=meant[0]))
            else:
                self._say(f"{host.name} does not have {self._request.name} ({_list_names(models)})")
        return found

    @property
    def queried_hosts(self) -> list[str]:
        return sorted(set(self._queried.values()))

    def absent_hosts(self) -> list[str]:
        """Hosts of the pool that are not connected."""
        there = {host.name for host in self._hosts.connected()}
        return [name for name in self._hosts.member_names() if name not in there]


def plausible_models(answer: HostModels) -> list[HostModel]:
    """Those that a user could be shown, and could name."""
    return [
        model
        for model in answer.models[:_MAX_MODELS]
        if 0 < len(model.name) <= MAX_NAME_CHARACTERS
        and len(model.source) <= MAX_NAME_CHARACTERS
        and model.name.isprintable()
        and model.source.isprintable()
        and 0 <= model.num_bytes <= _MAX_MODEL_BYTES
    ]


def printable(text: str) -> str:
    """Text of another host, without control characters and markup."""
    return escape("".join(char for char in text if char.isprintable())[:MAX_NAME_CHARACTERS])


def _list_names(models: Sequence[HostModel]) -> str:
    if not models:
        return "it has none"
    names = [printable(model.name) for model in models[:_MAX_LISTED]]
    more = f" and {len(models) - _MAX_LISTED} more" if len(models) > _MAX_LISTED else ""
    return f"it has: {', '.join(names)}{more}"


class FileHolder(Struct, frozen=True, kw_only=True):
    """A host that serves the file, of so many bytes, under its SHA-256."""

    name: str
    endpoint: str
    key: str
    num_bytes: int


class FileHolders(Struct, frozen=True, kw_only=True):
    holders: list[FileHolder]


class RemoteModelEntry(Struct, frozen=True, kw_only=True):
    """A model of another host's store."""

    host: str
    name: str
    source: str
    bytes: int


class RemoteModelList(Struct, frozen=True, kw_only=True):
    models: list[RemoteModelEntry]


def find_file_holders(hosts: PoolHosts, sha256: str) -> FileHolders:
    """Queries all that are connected; one that does not reply within a few seconds counts as without it."""
    if not is_digest(sha256):
        return FileHolders(holders=[])
    queried = hosts.with_pieces()
    answers = hosts.rpc.call_all([(host, FindFile(sha256=sha256)) for host in queried], silence_s=FIND_FILE_S)
    return FileHolders(
        holders=[
            FileHolder(name=host.name, endpoint=host.hello.pieces, key=host.key, num_bytes=answer.num_bytes)
            for host, answer in zip(queried, answers, strict=True)
            if isinstance(answer, HostFile) and answer.num_bytes > 0
        ]
    )


def list_remote_models(hosts: PoolHosts) -> RemoteModelList:
    """By host, then as each of them lists its own."""
    queried = hosts.with_pieces()
    answers = hosts.rpc.call_all([(host, ListHostModels()) for host in queried], silence_s=FIND_FILE_S)
    return RemoteModelList(
        models=[
            RemoteModelEntry(host=host.name, name=model.name, source=model.source, bytes=model.num_bytes)
            for host, answer in zip(queried, answers, strict=True)
            if isinstance(answer, HostModels)
            for model in plausible_models(answer)
        ]
    )
