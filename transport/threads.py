"""The environment of a process that computes with a certain number of threads."""

from __future__ import annotations

from collections.abc import Mapping

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
