"""Which pieces of a store running processes need: `leases/*.json`, each with a lock that its process holds."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType

import msgspec
from filelock import BaseFileLock, FileLock, Timeout

from transport.errors import DeadlineExceeded
from transport.pieces.part_file import try_lock
from transport.pieces.piece import Piece

_WAIT_S = 30.0
_pieces = msgspec.json.Decoder(tuple[Piece, ...])


class Lease(AbstractContextManager["Lease"]):
    """Closed at the latest with its process, however that ends."""

    def __init__(self, file: Path, lock: BaseFileLock) -> None:
        self._file = file
        self._lock = lock

    def close(self) -> None:
        self._file.unlink(missing_ok=True)
        self._lock.release()
        with contextlib.suppress(OSError):  # Windows, while somebody else looks at it.
            self._file.with_suffix(".lock").unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Leases:
    """Those of the store in `root`, of all processes."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / "leases"

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """While pieces are evicted no lease is taken, and the other way round. Raises DeadlineExceeded."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._root / "store.lock", thread_local=False)
        try:
            lock.acquire(timeout=_WAIT_S, poll_interval=0.01)
        except Timeout:
            raise DeadlineExceeded(
                f"another process has kept {self._root} locked for {_WAIT_S:.0f} s",
                hint="is its disk stuck? stop other potluck processes of this host",
            ) from None
        try:
            yield
        finally:
            lock.release()

    def take(self, pieces: Collection[Piece], path_of: Callable[[str], Path]) -> Lease:
        """Pieces that are there count as used now."""
        with self.exclusively():
            file = self._folder / f"{secrets.token_hex(8)}.json"
            lock = try_lock(file.with_suffix(".lock"))
            assert lock is not None
            file.write_bytes(msgspec.json.encode(tuple(pieces)))
            for piece in pieces:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path_of(piece.digest))
            return Lease(file, lock)

    def all(self) -> dict[str, Piece]:
        """The pieces that are leased, by digest. Only while nobody else takes one: see `exclusively`."""
        found: dict[str, Piece] = {}
        for lock_path in self._folder.glob("*.lock"):
            file = lock_path.with_suffix(".json")
            lock = try_lock(lock_path)
            if lock is not None:  # Its process is gone.
                file.unlink(missing_ok=True)
                lock.release()
                lock_path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):  # It is being closed.
                found |= {piece.digest: piece for piece in _pieces.decode(file.read_bytes())}
        return found
