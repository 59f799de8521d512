"""The short form of `make bench-memory`: a worker's memory is its own share. The long form loads 4 GB."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.stage.memory import measure
from shard.formats.spec import Backend


# MLX takes a fixed 100 MB or so more while it loads: its checkpoint is larger, so that a second copy would still show.
@pytest.mark.parametrize(("backend", "num_bytes"), [("torch", 0.5e9), ("mlx", 1.2e9)])
def test_each_of_three_workers_holds_its_third(tmp_path: Path, backend: Backend, num_bytes: float) -> None:
    found = measure(num_bytes, tmp_path, backend=backend)
    shares = found["share_of_weights"]
    assert isinstance(shares, list)
    assert len(shares) == 3
    # A third, and what a loader may need besides; two copies of a share would be two thirds.
    assert all(0.25 <= share <= 0.45 for share in shares), found
