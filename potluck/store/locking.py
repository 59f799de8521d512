"""One process at a time works on a model; the others wait, say so, and find it done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from potluck.store.disk import translated_write_errors
from potluck.store.progress import Progress, PullProgress

_POLL_S = 0.5


@contextmanager
def locked(path: Path, progress: Progress) -> Iterator[None]:
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
