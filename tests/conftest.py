"""Real parts that several tests share. The demo model is pulled once into a cache that outlives the test run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from potluck.store import Store


def models_home() -> Path:
    """`POTLUCK_TEST_HOME`, or a folder in the user's cache."""
    return Path(os.environ.get("POTLUCK_TEST_HOME") or Path.home() / ".cache" / "potluck-tests")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The folder of SmolLM2-135M-Instruct, as `open_checkpoint` and AutoTokenizer take it, to read only."""
    return Store(models_home()).pull("smollm2").path
