"""No process outlives the one that started it.

A parent gives each child a pipe as standard input and never writes to it. The pipe ends when the parent does, however
that ends, SIGKILL included; the child then removes the folder of sockets it was told to and exits at once.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

EXIT_ORPHANED = 75

_LOOK_EVERY_S = 0.25


def hold_lifeline(remove: Path | None = None) -> None:
    """Start watching standard input. `remove` is deleted when the parent is gone: the crashed parent can't."""
    threading.Thread(target=_watch, args=(sys.stdin.fileno(), remove), name="lifeline", daemon=True).start()


def read_pipe(descriptor: int, most: int, *, look_every_s: float = _LOOK_EVERY_S) -> bytes:
    """Wait for bytes from the parent, at most so many; b"" once its end is closed.

    On Windows a read that waits locks the pipe, and whatever else looks at standard input waits with it, for ever, as
    numpy's and torch's libraries do when they load (https://github.com/python/cpython/issues/78961). There it is read
    only when something has come, looked for every `look_every_s`.
    """
    if sys.platform == "win32":
        while not _has_come(descriptor):
            time.sleep(look_every_s)
    try:
        return os.read(descriptor, most)
    except BrokenPipeError:
        return b""


def lines_from_parent(descriptor: int, *, look_every_s: float = _LOOK_EVERY_S) -> Iterator[str]:
    """Whole lines, without their ends, until the parent closes the pipe."""
    rest = b""
    while block := read_pipe(descriptor, 4096, look_every_s=look_every_s):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace").rstrip("\r")


def _watch(descriptor: int, remove: Path | None) -> None:
    # Not sys.stdin: its lock, held by this thread for ever, aborts an orderly exit.
    while read_pipe(descriptor, 1):
        pass
    if remove is not None:
        shutil.rmtree(remove, ignore_errors=True)
    os._exit(EXIT_ORPHANED)


def _has_come(descriptor: int) -> bool:
    """Whether a read would return at once, with bytes or with the end. Windows only."""
    import _winapi  # As multiprocessing does: nothing public looks into a pipe.
    import msvcrt

    try:
        available: int = _winapi.PeekNamedPipe(msvcrt.get_osfhandle(descriptor), 0)[0]  # type: ignore[attr-defined,unused-ignore]
    except OSError:
        return True
    return available > 0
