"""Loading on MLX takes the memory of the stage's own weights: no second copy, no other layers, no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("mlx.core")

from tests.support.shard.mlx_load_peak import LARGEST_BYTES, LAYER_PARAMS


def test_peak_memory_is_the_stages_own_weights() -> None:
    command = [sys.executable, "-m", "tests.support.shard.mlx_load_peak"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
    found = json.loads(done.stdout)
    assert found["weights_bytes"] == 2 * LAYER_PARAMS * 4
    # Files are read into MLX's own memory: nothing is held twice. MLX's first kernels take some.
    assert found["grown_bytes"] <= found["weights_bytes"] + 0.5 * LARGEST_BYTES
    assert found["imported"] == []
