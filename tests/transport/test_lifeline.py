"""The pipe between a parent and its child, with real processes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from transport.lifeline import EXIT_ORPHANED

_CHILD = """
import sys, time
from pathlib import Path
from transport.lifeline import hold_lifeline

hold_lifeline(Path(sys.argv[1]))
print("ready", flush=True)
time.sleep(float(sys.argv[2]))
"""


def _child(folder: Path, lives_s: float) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(folder), str(lives_s)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    return child


def test_a_child_that_is_done_ends_well_while_its_parent_lives(tmp_path: Path) -> None:
    assert _child(tmp_path, 0.1).wait(10.0) == 0
    assert tmp_path.exists()


def test_a_child_that_lost_its_parent_removes_the_folder_and_ends(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    child = _child(tmp_path / "run", 60.0)
    started = time.monotonic()
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(10.0) == EXIT_ORPHANED
    assert time.monotonic() - started < 2.0
    assert not (tmp_path / "run").exists()
