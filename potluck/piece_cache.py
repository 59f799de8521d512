"""What this host keeps of other hosts' models: how much of which, and how to be rid of it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from potluck.borrowed_record import forget_borrowed
from potluck.paths import pieces_dir, shared_dir
from shard.shared_model import offered_digests, read_list
from transport.errors import BadCheckpoint
from transport.pieces.disk_space import free_bytes
from transport.pieces.eviction import stored_files
from transport.pieces.piece import PieceList
from transport.pieces.store import PieceStore, is_digest


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
    cached = (_cached(digest, pieces, whole) for digest, folder in _skeletons().items() if (pieces := _listed(folder)))
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
    # The model that this host itself offers would have to be read anew.
    offered = offered_digests(shared_dir())
    for digest, folder in _skeletons().items():
        pieces = _listed(folder)
        if digest not in offered and (pieces is None or not any(map(store.has, _digests(pieces)))):
            shutil.rmtree(folder, ignore_errors=True)
    forget_borrowed()
    return freed_bytes


def _skeletons() -> dict[str, Path]:
    shared = shared_dir()
    return {path.name: path for path in sorted(shared.iterdir()) if is_digest(path.name)} if shared.is_dir() else {}


def _listed(folder: Path) -> PieceList | None:
    try:
        return read_list(folder)
    except BadCheckpoint:
        return None


def _digests(pieces: PieceList) -> dict[str, int]:
    """Sizes of the different pieces of the model."""
    return {piece.digest: piece.num_bytes for file in pieces.files for piece in file.pieces}


def _cached(digest: str, pieces: PieceList, whole: set[str]) -> CachedModel:
    sizes = _digests(pieces)
    return CachedModel(
        name=pieces.model,
        digest=digest,
        held_bytes=sum(size for piece, size in sizes.items() if piece in whole),
        total_bytes=sum(sizes.values()),
    )
