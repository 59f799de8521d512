"""Threads that compute, and threads that must not be in their way."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping

_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_SPINS = "1000"
"""How often a thread of GNU's OpenMP looks whether the others are done before it sleeps. A token of SmolLM2 on two
cores took 6 ms by its own default and 7 ms so; while other programs wanted these cores, 260 ms and 15 to 30 ms."""


def thread_environment(threads: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What to set beside `environment`. Libraries read it when they are loaded; nothing is pinned to a core.

    How threads wait stays as the user has it, if `environment` says.
    """
    found = dict.fromkeys(_COUNTS, str(threads))
    if not environment.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        found["GOMP_SPINCOUNT"] = _SPINS
    return found


def give_way() -> None:
    """For this thread, and those that it starts: do not interrupt one that computes just because there is something to
    do. Stages share few cores with what tells clients of tokens, which nobody sees come a millisecond later.

    Linux only; elsewhere, or where it is forbidden, nothing changes.
    """
    _set_policy("SCHED_BATCH")


@contextlib.contextmanager
def giving_way() -> Iterator[None]:
    """`give_way`, for threads that are started inside."""
    give_way()
    try:
        yield
    finally:
        _set_policy("SCHED_OTHER")


def _set_policy(name: str) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, getattr(os, name), os.sched_param(0))
