"""Real parts that several tests share. The demo model is pulled once into a cache that outlives the test run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from potluck.store.store import Store
from tests.support.demo_model import models_home

# The same examples in each run, which pass or fail with the code alone, however slow the machine is; others with
# POTLUCK_TEST_EXPLORE=1.
settings.register_profile(
    "potluck",
    derandomize=not os.environ.get("POTLUCK_TEST_EXPLORE"),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("potluck")


def pytest_configure() -> None:
    """Under `nohup` a closed terminal is ignored, by all that the tests start too: they are about what it does."""
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)  # A process that is started begins without it.


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The folder of SmolLM2-135M-Instruct, as `open_checkpoint` and AutoTokenizer take it, to read only."""
    return Store(models_home()).pull("smollm2").path
