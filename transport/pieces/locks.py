"""Locks that end with their process: one writer for a part file, and leases that keep pieces from eviction.

Where the system can lock a file that is then renamed, it is the part itself that is locked, without a lock file beside
it: to make and remove one for each piece takes more time than all the rest (ext4 looks for an inode that was not freed
a moment ago, for each file that is made).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType

import msgspec
from filelock import BaseFileLock, FileLock, Timeout

from transport.errors import DeadlineExceeded
from transport.messages.pieces import Piece
from transport.timeouts import LEASE_LOCK_S

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_BUSY = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class PartFile:
    """An open `.part`, locked. Owned by one thread at a time."""

    def __init__(self, path: Path, fd: int, lock: BaseFileLock | None) -> None:
        """With `lock`, a file beside the part is locked, and else the part."""
        self.fd = fd
        self._path = path
        self._lock = lock
        self._is_open = True

    def move(self, target: Path) -> None:
        """Put the part in the place of `target`, and let go of it."""
        if self._lock is not None:
            self._close()  # Windows moves no file that is open.
        self._path.replace(target)
        self.release()
        self._forget_lock()

    def remove(self) -> None:
        if self._lock is not None:
            self._close()
        self._path.unlink(missing_ok=True)
        self.release()
        self._forget_lock()

    def release(self) -> None:
        """What is in it stays for the next one."""
        self._close()
        if self._lock is not None:
            self._lock.release()

    def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            os.close(self.fd)

    def _forget_lock(self) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):  # Windows, while somebody else looks at it.
                _lock_path(self._path).unlink(missing_ok=True)


def open_part(path: Path, *, create: bool = True) -> PartFile | None:
    """None if another process or thread has it, or has just ended with it. Raises OSError: FileNotFoundError without
    the folder, and where nothing is to be created."""
    flags = os.O_RDWR | (os.O_CREAT if create else 0)
    if fcntl is None:
        return _lock_beside(path, flags)
    fd = os.open(path, flags, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = _is_same(fd, path)
    except OSError as error:
        os.close(fd)
        if error.errno in _BUSY:
            return None
        if error.errno in _NO_LOCKS:  # Of this file system.
            return _lock_beside(path, flags)
        raise
    if not is_there:  # Who had it before has moved or removed it since it was opened here.
        os.close(fd)
        return None
    return PartFile(path, fd, None)


def try_lock(path: Path) -> BaseFileLock | None:
    """The lock at `path`, None if another process or thread has it. A process that is killed lets go of it."""
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def _lock_beside(path: Path, flags: int) -> PartFile | None:
    lock = try_lock(_lock_path(path))
    if lock is None:
        return None
    try:
        return PartFile(path, os.open(path, flags | getattr(os, "O_BINARY", 0), 0o644), lock)
    except BaseException:
        lock.release()
        raise


def _lock_path(path: Path) -> Path:
    return path.with_suffix(".lock")


def _is_same(fd: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)


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
            lock.acquire(timeout=LEASE_LOCK_S, poll_interval=0.01)
        except Timeout:
            raise DeadlineExceeded(
                f"another process has kept {self._root} locked for {LEASE_LOCK_S:.0f} s",
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

    def leased_pieces(self) -> dict[str, Piece]:
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
