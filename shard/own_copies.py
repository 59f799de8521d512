"""Pieces that this host has without knowing it: in a model's file that it downloaded by itself."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from transport.pieces.fetcher import ReportProgress
from transport.pieces.piece import ListedFile, Piece, PieceList, PlacedPiece
from transport.pieces.store import PieceStore

log = logging.getLogger("potluck.worker")


def take_from_own_files(
    pieces: PieceList,
    needed: Mapping[int, Piece],
    store: PieceStore,
    files: Sequence[Path],
    *,
    progress: ReportProgress = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Copy into the store what it lacks of the `needed` pieces, by their numbers in the list, and one of this host's
    `files` has. The bytes copied; what had been copied when `stop` said so is kept.

    A file is looked into if it is as large as one of the list's: each piece is then checked by its hash, and a first
    one that is wrong says that it is another file. Raises NoSpace.
    """
    given = list(_given(pieces, needed, store, files))
    total = sum({placed.digest: placed.num_bytes for _, missing in given for placed in missing}.values())
    if given:
        store.require_space(total)
    copied = 0
    for own, missing in given:
        try:
            for num_bytes in _copied(own, missing, store):
                copied += num_bytes
                progress(copied, total)
                if stop():
                    return copied
        except OSError as error:  # Of reading it: what the store says is no OSError.
            log.warning("%s can't be read: %s", own, error.strerror)
    return copied


def _given(
    pieces: PieceList, needed: Mapping[int, Piece], store: PieceStore, files: Sequence[Path]
) -> Iterator[tuple[Path, list[PlacedPiece]]]:
    """The files that may have something, each with what it may have."""
    sizes = {own: _size(own) for own in files}
    first = 0
    for listed in pieces.files:
        like_it = [own for own, size in sizes.items() if size == listed.num_bytes]
        missing = _missing(listed, first, needed, store) if like_it else []
        first += len(listed.pieces)
        if missing:
            yield from ((own, missing) for own in like_it)


def _missing(listed: ListedFile, first: int, needed: Mapping[int, Piece], store: PieceStore) -> list[PlacedPiece]:
    numbered = enumerate(listed.pieces, first)
    return [placed for number, placed in numbered if number in needed and not store.has(placed.digest)]


def _copied(own: Path, missing: Sequence[PlacedPiece], store: PieceStore) -> Iterator[int]:
    """The bytes of each piece that is copied, until one is not in the file. Raises OSError."""
    with own.open("rb") as file:
        for placed in missing:
            if store.has(placed.digest):
                continue
            file.seek(placed.offset)
            data = file.read(placed.num_bytes)
            if hashlib.sha256(data).hexdigest() != placed.digest:
                return
            store.put(data, placed.digest)
            yield len(data)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
