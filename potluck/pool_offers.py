"""What the other hosts of a pool have, for commands on the head's host: whole files by their SHA-256, and models."""

from __future__ import annotations

from msgspec import Struct

from potluck.pool_hosts import PoolHost, PoolHosts
from potluck.wanted_model import checked_models
from transport.pieces.store import is_digest
from transport.pool_messages import AskFiles, AskModels, HostFile, HostModels

_ANSWER_WITHIN_S = 3.0


class FileHolder(Struct, frozen=True, kw_only=True):
    """A host that gives the file, of so many bytes, under its SHA-256."""

    name: str
    endpoint: str
    key: str
    num_bytes: int


class FileHolders(Struct, frozen=True, kw_only=True):
    holders: list[FileHolder]


class ModelElsewhere(Struct, frozen=True, kw_only=True):
    """A model of another host's store."""

    host: str
    name: str
    source: str
    bytes: int


class ModelsElsewhere(Struct, frozen=True, kw_only=True):
    models: list[ModelElsewhere]


def file_holders(hosts: PoolHosts, sha256: str) -> FileHolders:
    """Asks all that are there; who does not answer within a few seconds has it not."""
    if not is_digest(sha256):
        return FileHolders(holders=[])
    asked = _givers(hosts)
    answers = hosts.questions.ask([(host, AskFiles(sha256=sha256)) for host in asked], silence_s=_ANSWER_WITHIN_S)
    return FileHolders(
        holders=[
            FileHolder(name=host.name, endpoint=host.arrive.pieces, key=host.key, num_bytes=answer.num_bytes)
            for host, answer in zip(asked, answers, strict=True)
            if isinstance(answer, HostFile) and answer.num_bytes > 0
        ]
    )


def models_elsewhere(hosts: PoolHosts) -> ModelsElsewhere:
    """By host, then as each of them lists its own."""
    asked = _givers(hosts)
    answers = hosts.questions.ask([(host, AskModels()) for host in asked], silence_s=_ANSWER_WITHIN_S)
    return ModelsElsewhere(
        models=[
            ModelElsewhere(host=host.name, name=model.name, source=model.source, bytes=model.num_bytes)
            for host, answer in zip(asked, answers, strict=True)
            if isinstance(answer, HostModels)
            for model in checked_models(answer)
        ]
    )


def _givers(hosts: PoolHosts) -> list[PoolHost]:
    return [host for host in hosts.all() if host.arrive.pieces]
