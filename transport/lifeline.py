"""No process outlives the one that started it.

A parent gives each child a pipe as standard input and never writes to it. The pipe ends when the parent does, however
that ends, SIGKILL included; the child then removes the folder of sockets it was told to and exits at once.
"""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

EXIT_ORPHANED = 75
_STDIN = 0


def hold_lifeline(remove: Path | None = None) -> None:
    """Start watching standard input. `remove` is deleted when the parent is gone: the crashed parent can't."""
    threading.Thread(target=_watch, args=(remove,), name="lifeline", daemon=True).start()


def _watch(remove: Path | None) -> None:
    # Not through sys.stdin: its lock would be held here while the interpreter, at its end, waits for it and aborts.
    while os.read(_STDIN, 1):
        pass
    if remove is not None:
        shutil.rmtree(remove, ignore_errors=True)
    os._exit(EXIT_ORPHANED)
