"""Pieces that this host has without knowing it: in a model's file that it downloaded by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from transport.errors import WrongBytes
from transport.pieces.piece import ListedFile, Piece, PieceList
from transport.pieces.store import PieceStore

_READ_BYTES = 1 << 23


def take_from_own_files(
    pieces: PieceList, needed: Mapping[int, Piece], store: PieceStore, files: Sequence[Path]
) -> int:
    """Copy into the store what it lacks of the `needed` pieces, by their numbers in the list, and one of this host's
    `files` has. The bytes copied.

    A file is looked into if it is as large as one of the list's: each piece is then checked by its hash, and a first
    one that is wrong says that it is another file. Raises NoSpace.
    """
    copied = 0
    first = 0
    for listed in pieces.files:
        numbers = range(first, first + len(listed.pieces))
        first += len(listed.pieces)
        missing = [number for number in numbers if number in needed and not store.has(needed[number].digest)]
        for own in files if missing else ():
            if _size(own) == listed.num_bytes:
                copied += _copy(own, listed, [number - numbers.start for number in missing], store)
    return copied


def _copy(own: Path, listed: ListedFile, indexes: Sequence[int], store: PieceStore) -> int:
    copied = 0
    with own.open("rb") as file:
        for index in indexes:
            placed = listed.pieces[index]
            if store.has(placed.digest):
                continue
            store.require_space(placed.num_bytes)
            partial = store.open_partial(Piece(placed.digest, placed.num_bytes))
            if partial is None:
                continue
            try:
                partial.restart()
                file.seek(placed.offset)
                left = placed.num_bytes
                while left and (data := file.read(min(left, _READ_BYTES))):
                    partial.write(data)
                    left -= len(data)
                partial.commit()
            except WrongBytes:
                return copied
            except BaseException:
                partial.close()
                raise
            copied += placed.num_bytes
    return copied


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
