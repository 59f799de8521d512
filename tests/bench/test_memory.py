"""The short form of `make bench-memory`: a worker's memory is its own share. The long form loads 4 GB."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.memory import measure


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_each_of_three_workers_holds_its_third(tmp_path: Path, backend: str) -> None:
    found = measure(0.5e9, tmp_path, backend=backend)
    shares = found["share_of_weights"]
    assert isinstance(shares, list)
    assert len(shares) == 3
    # A third, and what a loader may need besides; two copies of a share would be two thirds.
    assert all(0.3 <= share <= 0.45 for share in shares), found
