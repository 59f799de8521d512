"""A parent starts a child with its options and threads, and a child ends when its parent does.

A parent gives each child a pipe as standard input. The pipe ends when the parent does, however that ends, SIGKILL
included; the child then removes the folder of sockets that it was given and exits at once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# https://learn.microsoft.com/windows/win32/procthread/process-creation-flags; subprocess has them on Windows only.
_CREATE_NEW_PROCESS_GROUP = 0x00000200
_CREATE_NO_WINDOW = 0x08000000


def detached_popen_kwargs() -> dict[str, Any]:
    """Options of Popen for a child that a Ctrl-C in the parent's terminal does not reach: the parent ends it in order.

    On Windows it has no window either, also where the parent has none that it could share.
    """
    if sys.platform == "win32":
        return {"creationflags": _CREATE_NEW_PROCESS_GROUP | _CREATE_NO_WINDOW}
    return {"start_new_session": True}


def python_command() -> list[str]:
    """This interpreter, for a module of ours: a folder of the user's that is named like one of ours must not come
    first (-P)."""
    return [_interpreter(), "-P", "-m"]


def python_environment() -> dict[str, str]:
    """What to set for such a child: text in UTF-8, whatever the system's encoding is, and its virtual environment."""
    found = {"PYTHONUTF8": "1"}
    if _interpreter() != sys.executable:
        found["__PYVENV_LAUNCHER__"] = sys.executable
    return found


def _interpreter() -> str:
    """In a virtual environment on Windows `sys.executable` starts another process, the real one, with another id: who
    ends or names the one misses the other. As multiprocessing does, the real one is started at once."""
    base = getattr(sys, "_base_executable", None)
    return str(base) if sys.platform == "win32" and base else sys.executable


_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_SPIN_COUNT = "1000"
"""How often a thread of GNU's OpenMP looks whether the others are done before it sleeps. A token of SmolLM2 on two
cores took 6 ms by its own default and 7 ms so; while other programs wanted these cores, 260 ms and 15 to 30 ms."""


def thread_environment(threads: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What to set beside `environment`. Libraries read it when they are loaded; nothing is pinned to a core.

    How threads wait stays as the user has it, if `environment` says.
    """
    found = dict.fromkeys(_THREAD_VARIABLES, str(threads))
    if not environment.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        found["GOMP_SPINCOUNT"] = _SPIN_COUNT
    return found


def lower_priority() -> None:
    """For this thread, and those that it starts: do not interrupt one that computes just because there is something to
    do. Stages share few cores with what tells clients of tokens, which nobody sees come a millisecond later.

    Linux only; elsewhere, or where it is forbidden, nothing changes.
    """
    _set_policy("SCHED_BATCH")


@contextlib.contextmanager
def lowered_priority() -> Iterator[None]:
    """`lower_priority`, for threads that are started inside."""
    lower_priority()
    try:
        yield
    finally:
        _set_policy("SCHED_OTHER")


def _set_policy(name: str) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, getattr(os, name), os.sched_param(0))


EXIT_ORPHANED = 75

_POLL_S = 0.25


def start_parent_watch(remove: Path | None = None) -> None:
    """Start watching standard input. `remove` is deleted when the parent is gone: the crashed parent can't."""
    threading.Thread(target=_watch_parent, args=(sys.stdin.fileno(), remove), name="parent-watch", daemon=True).start()


def read_pipe(descriptor: int, max_bytes: int, *, poll_s: float = _POLL_S) -> bytes:
    """Wait for bytes from the parent, at most so many; b"" once its end is closed.

    On Windows a read that waits locks the pipe, and whatever else looks at standard input waits with it, for ever, as
    numpy's and torch's libraries do when they load (https://github.com/python/cpython/issues/78961). There it is read
    only when something has come, looked for every `poll_s`.
    """
    if sys.platform == "win32":
        while not _is_readable(descriptor):
            time.sleep(poll_s)
    try:
        return os.read(descriptor, max_bytes)
    except BrokenPipeError:
        return b""


def lines_from_parent(descriptor: int, *, poll_s: float = _POLL_S) -> Iterator[str]:
    """Whole lines, without their ends, until the parent closes the pipe."""
    rest = b""
    while block := read_pipe(descriptor, 4096, poll_s=poll_s):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace").rstrip("\r")


def _watch_parent(descriptor: int, remove: Path | None) -> None:
    # Not sys.stdin: its lock, held by this thread for ever, aborts an orderly exit.
    while read_pipe(descriptor, 1):
        pass
    if remove is not None:
        shutil.rmtree(remove, ignore_errors=True)
    os._exit(EXIT_ORPHANED)


def _is_readable(descriptor: int) -> bool:
    """Whether a read would return at once, with bytes or with the end. Windows only."""
    import _winapi  # As multiprocessing does: nothing public looks into a pipe.
    import msvcrt

    try:
        available: int = _winapi.PeekNamedPipe(msvcrt.get_osfhandle(descriptor), 0)[0]  # type: ignore[attr-defined,unused-ignore]
    except OSError:
        return True
    return available > 0
