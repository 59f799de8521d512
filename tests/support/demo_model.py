"""Where the demo model lies that tests share; it outlives the test run."""

from __future__ import annotations

import os
from pathlib import Path


def models_home() -> Path:
    """`POTLUCK_TEST_HOME`, or a folder in the user's cache."""
    return Path(os.environ.get("POTLUCK_TEST_HOME") or Path.home() / ".cache" / "potluck-tests")
