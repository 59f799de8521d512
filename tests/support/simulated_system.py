"""Another system, as far as our own modules can tell: see `tests/support/simulated/sitecustomize.py`."""

from __future__ import annotations

import os
from pathlib import Path

SYSTEMS = ("Windows", "macOS")


def environment_of(system: str) -> dict[str, str]:
    """That of a process, and of all that it starts. No ipc sockets on Windows."""
    simulated = str(Path(__file__).parent / "simulated")
    found = os.environ | {"POTLUCK_TEST_SYSTEM": system, "PYTHONPATH": simulated}
    return found | {"POTLUCK_NO_IPC": "1"} if system == "Windows" else found
