"""Children end with their parent, however that ends, and all of them when they are told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from transport.process.child_process import ChildProcess, stop_processes

_STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""
_WITH_A_LIFELINE = """
import sys, time
from pathlib import Path
if "slowly" in sys.argv:
    time.sleep(0.5)  # As an import of a large library takes, during which the parent dies.
from transport.process.child import start_parent_watch
start_parent_watch(Path(sys.argv[1]))
print("ready é", flush=True)
time.sleep(600)
"""
_PARENT = """
import sys, time
from pathlib import Path
from transport.process.child_process import ChildProcess
child = ChildProcess("with_a_lifeline", sys.argv[1:], log=Path(sys.argv[1]).parent / "child.log")
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Children that are no part of Potluck, where Python finds them."""
    (tmp_path / "stubborn.py").write_text(_STUBBORN, encoding="utf-8")
    (tmp_path / "with_a_lifeline.py").write_text(_WITH_A_LIFELINE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.fixture
def children() -> Iterator[list[ChildProcess]]:
    started: list[ChildProcess] = []
    yield started
    for child in started:
        child.kill()
        child.wait(60.0)


def _wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120.0
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_all_are_gone_also_one_that_does_not_listen(tmp_path: Path, children: list[ChildProcess]) -> None:
    for number, module in enumerate(("stubborn", "with_a_lifeline")):
        children.append(ChildProcess(module, [str(tmp_path / "run")], log=tmp_path / f"{number}.log"))
    _wait_until(lambda: all("ready" in child.last_log_line() for child in children))
    assert children[1].last_log_line() == "ready é"
    stop_processes(children)
    assert [child.exit_code() for child in children] == [-signal.SIGKILL, -signal.SIGTERM]
    stop_processes(children)  # Nobody is there any more.


def test_one_that_can_not_be_told_does_not_save_the_others(
    tmp_path: Path, children: list[ChildProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    children += [ChildProcess("stubborn", [], log=tmp_path / f"{number}.log") for number in range(2)]
    terminate = subprocess.Popen.terminate

    def refused(process: subprocess.Popen[bytes]) -> None:
        if process.pid == children[0].pid:
            raise PermissionError("not now")
        terminate(process)

    monkeypatch.setattr(subprocess.Popen, "terminate", refused)
    stop_processes(children)
    assert all(child.exit_code() is not None for child in children)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
@pytest.mark.parametrize("how", [[], ["slowly"]])
def test_a_parent_that_dies_takes_its_child_with_it(tmp_path: Path, number: signal.Signals, how: list[str]) -> None:
    """Also while the child is still starting."""
    run = tmp_path / "run"
    run.mkdir()
    parent = subprocess.Popen([sys.executable, "-P", "-c", _PARENT, str(run), *how], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    if not how:
        _wait_until(lambda: "ready" in (tmp_path / "child.log").read_text(encoding="utf-8"))
    parent.send_signal(number)
    parent.wait(120.0)
    psutil.wait_procs([child], timeout=120.0)
    assert not child.is_running()
    assert not run.exists()


def test_a_ctrl_c_in_the_terminal_is_the_parents_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", ignoring + _PARENT, str(run)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    _wait_until(lambda: "ready" in (tmp_path / "child.log").read_text(encoding="utf-8"))
    assert os.getsid(child.pid) == child.pid
    os.killpg(parent.pid, signal.SIGINT)
    assert child.is_running() and parent.poll() is None
    parent.kill()
    parent.wait(120.0)
    psutil.wait_procs([child], timeout=120.0)
    assert not child.is_running()
