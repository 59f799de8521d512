"""Disk functions ask for space before it is needed, translate write errors, and lock a model's files."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from filelock import FileLock, Timeout

from potluck.store.sources import ProgressCallback, PullProgress
from transport.errors import NoSpace, PotluckError

BLOCK_BYTES = 1 << 20
# Room for the index, the tokenizer and the file system's own book-keeping.
MARGIN_BYTES = 32 << 20
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_WRITE_REFUSED_ERRNOS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EIO,
)


def require_space(folder: Path, need_bytes: int, what: str, *, setting: str = "POTLUCK_HOME") -> None:
    """Raise NoSpace unless `folder` has room for `need_bytes` more and a margin. `setting` says where it lies."""
    free_bytes = _free_bytes(folder)
    if need_bytes + MARGIN_BYTES > free_bytes:
        raise _no_space(folder, f"{what} needs {mb(need_bytes + MARGIN_BYTES)}", free_bytes, setting)


@contextmanager
def translated_write_errors(folder: Path, what: str, *, setting: str = "POTLUCK_HOME") -> Iterator[None]:
    """Inside, an OSError of writing in `folder` becomes NoSpace, or a PotluckError that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            raise _no_space(folder, f"the disk filled up while writing {what}", _free_bytes(folder), setting) from error
        if error.errno in _WRITE_REFUSED_ERRNOS:
            raise PotluckError(
                f"can't write {what} in {folder}: {error.strerror}",
                hint=f"see that you may write there, or set {setting} to another folder",
            ) from error
        raise


def _free_bytes(folder: Path) -> int:
    """Of its disk, also if the folder itself could not be made any more."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _no_space(folder: Path, what: str, free_bytes: int, setting: str) -> NoSpace:
    return NoSpace(
        f"{what}; {folder} has {mb(free_bytes)} free",
        hint=f"free some space (potluck rm removes models), or set {setting} to a folder on another disk",
    )


def mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 10e6 else f"{count / 1e6:,.0f} MB"


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


def hash_stream(stream: IO[bytes], digest: _Hash, count: Callable[[int], None], copy: IO[bytes] | None = None) -> None:
    """Read to the end, feed `digest` and write `copy`; `count` takes each block's size."""
    while block := stream.read(BLOCK_BYTES):
        digest.update(block)
        if copy is not None:
            copy.write(block)
        count(len(block))


_POLL_S = 0.5


@contextmanager
def locked(path: Path, progress: ProgressCallback) -> Iterator[None]:
    """Hold the lock file `path`. A process that is killed lets go of it by itself, so waiting needs no limit."""
    with translated_write_errors(path.parent, "a lock"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        while True:
            try:
                lock.acquire(timeout=_POLL_S, poll_interval=0.05)
                break
            except Timeout:
                progress(PullProgress(stage="waiting", done=0, total=None))
    try:
        yield
    finally:
        lock.release()
