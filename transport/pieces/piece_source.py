"""Where a piece server finds the bytes: this host's store of pieces, and models' files where they lie.

Only files that one of this host's own piece lists names are ever opened: who asks names what is in a piece, not where.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from transport.messages.pieces import MAX_LIST_BYTES, PieceList, bitmap_of
from transport.process.files import FileStamp

_MAX_KNOWN_LISTS = 8
_MAX_WHOLE_FILES = 256
_RECHECK_INTERVAL_S = 0.3
_lists = msgspec.json.Decoder(PieceList)


class Located(NamedTuple):
    path: Path
    offset: int
    num_bytes: int


class PieceSource(Protocol):
    """Called by the server's thread for every request: both must be quick. May raise OSError."""

    def locate(self, digest: str) -> Located | None:
        """Where the piece lies; None if it is not here, or not any more."""
        ...

    def have_bitmap(self, model: str) -> bytes:
        """Which pieces of the model with this digest are here, as `HaveList` has it; empty for an unknown model."""
        ...


class StoredPieces(Protocol):
    """What `StoreSource` needs of a store."""

    def has(self, digest: str) -> bool: ...

    def digests(self) -> set[str]: ...

    def path(self, digest: str) -> Path: ...


class StoreSource:
    """Pieces of a content-addressed store, piece lists included. What `have_bitmap` says can be a moment old."""

    def __init__(self, store: StoredPieces, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._known: OrderedDict[str, _KnownModel] = OrderedDict()

    def locate(self, digest: str) -> Located | None:
        if not self._store.has(digest):
            return None
        path = self._store.path(digest)
        return Located(path, 0, path.stat().st_size)

    def have_bitmap(self, model: str) -> bytes:
        known = self._known.get(model) or self._read(model)
        if known is None:
            return b""
        now_s = self._clock()
        # Several hosts ask twice a second, and both lists and stores can be long.
        if known.checked_at_s is None or now_s - known.checked_at_s >= _RECHECK_INTERVAL_S:
            known.checked_at_s = now_s
            here = self._store.digests()
            known.bitmap = bitmap_of([digest in here for digest in known.digests])
        return known.bitmap

    def _read(self, model: str) -> _KnownModel | None:
        """None if its list is not in the store."""
        located = self.locate(model)
        if located is None or located.num_bytes > MAX_LIST_BYTES:
            return None
        try:
            pieces = _lists.decode(located.path.read_bytes())
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None  # A piece like others, not a list.
        digests = [piece.digest for file in pieces.files for piece in file.pieces]
        known = self._known[model] = _KnownModel(digests)
        while len(self._known) > _MAX_KNOWN_LISTS:
            self._known.popitem(last=False)
        return known


@dataclass(slots=True)
class _KnownModel:
    """A model's pieces, and which of them were in the store when it was last looked."""

    digests: list[str]
    checked_at_s: float | None = None
    bitmap: bytes = b""


class FolderSource:
    """A model's files in `folder`, as its piece list has them; what has changed since then is not given away.

    `stamps` are by file name; a file without one is left out. `list_file` is the list itself, if others may have it.
    """

    def __init__(
        self,
        folder: Path,
        pieces: PieceList,
        *,
        model: str,
        stamps: Mapping[str, FileStamp],
        list_file: Path | None = None,
    ) -> None:
        self._folder = folder
        self._pieces = pieces
        self._model = model
        self._stamps = dict(stamps)
        self._list_file = list_file
        self._places = {
            piece.digest: (file.name, piece.offset, piece.num_bytes)
            for file in pieces.files
            if file.name in self._stamps
            for piece in file.pieces
        }

    def locate(self, digest: str) -> Located | None:
        if digest == self._model and self._list_file is not None:
            return Located(self._list_file, 0, self._list_file.stat().st_size)
        place = self._places.get(digest)
        if place is None or not self._is_unchanged(place[0]):
            return None
        name, offset, num_bytes = place
        return Located(self._folder / name, offset, num_bytes)

    def have_bitmap(self, model: str) -> bytes:
        if model != self._model:
            return b""
        held: list[bool] = []
        for file in self._pieces.files:
            held += [self._is_unchanged(file.name)] * len(file.pieces)
        return bitmap_of(held)

    def _is_unchanged(self, name: str) -> bool:
        stamp = self._stamps.get(name)
        if stamp is None:
            return False
        try:
            return FileStamp.of(self._folder / name) == stamp
        except OSError:
            return False


class WholeFiles:
    """Whole files, each by its SHA-256 as if it were one piece. Who adds one vouches for its checksum."""

    def __init__(self) -> None:
        self._places: OrderedDict[str, tuple[Path, FileStamp]] = OrderedDict()

    def add(self, sha256: str, path: Path) -> int:
        """How many bytes it has. From any thread. Raises OSError."""
        stamp = FileStamp.of(path)
        # Replaced as a whole: the server's thread may be looking.
        places = OrderedDict(self._places)
        places[sha256] = (path, stamp)
        places.move_to_end(sha256)
        while len(places) > _MAX_WHOLE_FILES:
            places.popitem(last=False)
        self._places = places
        return stamp.num_bytes

    def locate(self, digest: str) -> Located | None:
        place = self._places.get(digest)
        if place is None:
            return None
        path, stamp = place
        return Located(path, 0, stamp.num_bytes) if FileStamp.of(path) == stamp else None

    def have_bitmap(self, model: str) -> bytes:
        return b""
