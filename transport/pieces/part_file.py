"""The file of a piece that is coming in, open to one writer at a time: the lock ends with its process in any case.

Where the system can lock a file that is then renamed, it is the part itself that is locked, without a lock file beside
it: to make and remove one for each piece takes more time than all the rest (ext4 looks for an inode that was not freed
a moment ago, for each file that is made).
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

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
        return _beside(path, flags)
    fd = os.open(path, flags, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = _is_same(fd, path)
    except OSError as error:
        os.close(fd)
        if error.errno in _BUSY:
            return None
        if error.errno in _NO_LOCKS:  # Of this file system.
            return _beside(path, flags)
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


def _beside(path: Path, flags: int) -> PartFile | None:
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
