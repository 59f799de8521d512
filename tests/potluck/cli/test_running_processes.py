"""Which processes are Potluck's, and use these folders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from potluck.cli.running_processes import check_not_running, parse_command_line, processes_using
from transport.errors import AlreadyRunning


@pytest.mark.parametrize(
    ("command", "does"),
    [
        (["/venv/bin/python", "-P", "-m", "potluck", "up", "smollm2"], "potluck up"),
        (["/venv/bin/python", "/venv/bin/potluck", "join", "--head", "a:1"], "potluck join"),
        (["C:/venv/Scripts/potluck.exe", "up"], "potluck up"),
        (["python", "-P", "-m", "shard.worker", "--control", "x"], "shard.worker"),
        (["python", "-P", "-m", "potluck.engine.process"], "potluck.engine.process"),
        (["vim", "a", "b", "potluck"], None),
        (["grep", "-m", "1", "potluck"], None),
        (["python", "-m", "pytest", "potluck"], None),
        ([], None),
    ],
)
def test_a_command_line_is_read(command: list[str], does: str | None) -> None:
    assert parse_command_line(command) == does


def test_a_process_with_this_folder_is_in_the_way_and_one_with_another_is_not(tmp_path: Path) -> None:
    # As the worker is told by its command line: this one only waits for its standard input to end.
    (tmp_path / "shard").mkdir()
    (tmp_path / "shard" / "worker.py").write_text("import sys\nprint('here', flush=True)\nsys.stdin.read()\n")
    (tmp_path / "shard" / "__init__.py").touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "shard.worker"],
        cwd=tmp_path,
        env=os.environ | {"POTLUCK_HOME": str(tmp_path / "home")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"here\n"
        assert [user.pid for user in processes_using(tmp_path / "home")] == [process.pid]
        with pytest.raises(AlreadyRunning, match=str(process.pid)):
            check_not_running(tmp_path / "home")
        check_not_running(tmp_path / "another")
    finally:
        process.communicate(timeout=60)
    check_not_running(tmp_path / "home")


def test_a_pull_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "locks").mkdir()
    with FileLock(tmp_path / "locks" / "tiny.lock"), pytest.raises(AlreadyRunning, match="tiny"):
        check_not_running(tmp_path)
    check_not_running(tmp_path)
