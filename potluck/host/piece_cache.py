"""What this host keeps of other hosts' models: how much of which, which host had it, and how to be rid of it."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from potluck.system.paths import pieces_dir, shared_dir
from shard.pieces.metadata import read_list, shared_digests
from transport.errors import BadCheckpoint
from transport.messages.pieces import PieceList
from transport.pieces.disk_space import free_bytes, stored_files
from transport.pieces.store import PieceStore, is_digest
from transport.process.files import write_atomic

_RECORDS_FOLDER = "borrowed"


class RemoteModelRecord(Struct, frozen=True, kw_only=True):
    """`digest` is the model's, `peer` (the name) and `key` are of the host that had it."""

    name: str
    digest: str
    peer: str = msgspec.field(name="lender")
    key: str


def read_remote_record(name: str) -> RemoteModelRecord | None:
    try:
        record = msgspec.json.decode(_record_path(name).read_bytes(), type=RemoteModelRecord)
    except (OSError, msgspec.MsgspecError):
        return None
    return record if record.name == name and is_digest(record.digest) else None


def write_remote_record(record: RemoteModelRecord) -> None:
    """Failing to only means that the host has to be there the next time."""
    path = _record_path(record.name)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, msgspec.json.encode(record))


def prune_remote_records() -> None:
    """All whose models are not kept any more."""
    for path in (shared_dir() / _RECORDS_FOLDER).glob("*.json"):
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            record = msgspec.json.decode(path.read_bytes(), type=RemoteModelRecord)
            if is_digest(record.digest) and not (shared_dir() / record.digest).is_dir():
                path.unlink()


def _record_path(name: str) -> Path:
    return shared_dir() / _RECORDS_FOLDER / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedModel:
    """`held_bytes` of the model's `total_bytes` are here; models can have pieces in common."""

    name: str
    digest: str
    held_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """`limit_bytes` None: as much as the disk has room for."""

    folder: Path
    used_bytes: int
    limit_bytes: int | None
    free_bytes: int
    models: tuple[CachedModel, ...]


def report_cache() -> CacheReport:
    """Raises ConfigError for a limit that can't be read."""
    store = PieceStore(pieces_dir())
    files = stored_files(store.root)
    whole = {file.digest for file in files if file.is_whole}
    cached = (
        _cached_model(digest, pieces, whole)
        for digest, folder in _metadata_folders().items()
        if (pieces := _read_list_or_none(folder))
    )
    return CacheReport(
        folder=store.root,
        used_bytes=sum(file.num_bytes for file in files),
        limit_bytes=store.limit_bytes,
        free_bytes=free_bytes(store.root),
        models=tuple(sorted((model for model in cached if model.held_bytes), key=lambda model: -model.held_bytes)),
    )


def clear_cache() -> int:
    """Remove all pieces that no running worker needs, and what models that are all gone were opened from; the bytes of
    pieces freed. Raises PotluckError."""
    store = PieceStore(pieces_dir())
    freed_bytes = store.clear()
    # The model that this host itself offers would have to be read again.
    offered = shared_digests(shared_dir())
    for digest, folder in _metadata_folders().items():
        pieces = _read_list_or_none(folder)
        if digest not in offered and (pieces is None or not any(map(store.has, _digests(pieces)))):
            shutil.rmtree(folder, ignore_errors=True)
    prune_remote_records()
    return freed_bytes


def _metadata_folders() -> dict[str, Path]:
    shared = shared_dir()
    return {path.name: path for path in sorted(shared.iterdir()) if is_digest(path.name)} if shared.is_dir() else {}


def _read_list_or_none(folder: Path) -> PieceList | None:
    try:
        return read_list(folder)
    except BadCheckpoint:
        return None


def _digests(pieces: PieceList) -> dict[str, int]:
    """Sizes of the different pieces of the model."""
    return {piece.digest: piece.num_bytes for file in pieces.files for piece in file.pieces}


def _cached_model(digest: str, pieces: PieceList, whole: set[str]) -> CachedModel:
    sizes = _digests(pieces)
    return CachedModel(
        name=pieces.model,
        digest=digest,
        held_bytes=sum(size for piece, size in sizes.items() if piece in whole),
        total_bytes=sum(sizes.values()),
    )
