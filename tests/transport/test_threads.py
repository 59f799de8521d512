"""Children compute with the threads they were given, and wait as the user wants."""

from __future__ import annotations

import pytest

from transport.process.child import thread_environment


def test_every_library_is_told() -> None:
    found = thread_environment(3, {"OMP_NUM_THREADS": "8"})
    counts = {name: value for name, value in found.items() if name != "GOMP_SPINCOUNT"}
    assert set(counts.values()) == {"3"}
    assert {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"} == counts.keys()
    assert int(found["GOMP_SPINCOUNT"]) < 300_000


@pytest.mark.parametrize("said", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_how_to_wait_is_the_users_to_say(said: str) -> None:
    assert "GOMP_SPINCOUNT" not in thread_environment(3, {said: "active"})


def test_nothing_is_pinned() -> None:
    assert not [name for name in thread_environment(3, {}) if "BIND" in name or "AFFINITY" in name or "PLACES" in name]
