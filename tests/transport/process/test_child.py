"""Children start with their options and threads, and end with their parent: real processes, and as if on Windows."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from transport.process.child import (
    EXIT_ORPHANED,
    detached_popen_kwargs,
    lines_from_parent,
    python_command,
    python_environment,
    read_pipe,
    thread_environment,
)


def test_every_library_is_told() -> None:
    found = thread_environment(3, {"OMP_NUM_THREADS": "8"})
    counts = {name: value for name, value in found.items() if name != "GOMP_SPINCOUNT"}
    assert set(counts.values()) == {"3"}
    assert {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"} == counts.keys()
    assert int(found["GOMP_SPINCOUNT"]) < 300_000


@pytest.mark.parametrize("said", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_how_to_wait_is_the_users_to_say(said: str) -> None:
    assert "GOMP_SPINCOUNT" not in thread_environment(3, {said: "active"})


def test_nothing_is_pinned() -> None:
    assert not [name for name in thread_environment(3, {}) if "BIND" in name or "AFFINITY" in name or "PLACES" in name]


def test_a_child_of_this_system_leads_a_session_of_its_own() -> None:
    said = subprocess.run(
        [sys.executable, "-c", "import os, sys; print(os.getsid(0) == os.getpid(), sys.flags.utf8_mode)"],
        env=os.environ | python_environment(),
        capture_output=True,
        encoding="utf-8",
        check=True,
        **detached_popen_kwargs(),
    )
    assert said.stdout.split() == ["True", "1"]
    assert python_command() == [sys.executable, "-P", "-m"]


def test_on_windows_a_child_has_a_group_and_no_window_and_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sys, "executable", r"C:\venv\Scripts\python.exe")
    monkeypatch.setattr(sys, "_base_executable", r"C:\Python\python.exe", raising=False)
    assert detached_popen_kwargs() == {"creationflags": 0x00000200 | 0x08000000}
    assert python_command()[0] == r"C:\Python\python.exe"
    assert python_environment()["__PYVENV_LAUNCHER__"] == r"C:\venv\Scripts\python.exe"
    monkeypatch.setattr(sys, "executable", r"C:\Python\python.exe")
    assert "__PYVENV_LAUNCHER__" not in python_environment()


_CHILD = """
import sys, time
from pathlib import Path
from transport.process.child import start_parent_watch

start_parent_watch(Path(sys.argv[1]))
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
    assert _child(tmp_path, 0.1).wait(60.0) == 0
    assert tmp_path.exists()


def test_a_child_that_lost_its_parent_removes_the_folder_and_ends(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    child = _child(tmp_path / "run", 600.0)
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(60.0) == EXIT_ORPHANED
    assert not (tmp_path / "run").exists()


class _FakeWindows:
    """What `_winapi` and `msvcrt` would say of a pipe of this system. A read that would wait is a failure: on Windows
    every other thread that looks at the pipe would wait with it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looked = 0
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.setitem(sys.modules, "_winapi", SimpleNamespace(PeekNamedPipe=self.peek))
        monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(get_osfhandle=lambda descriptor: descriptor))
        read = os.read

        def read_at_once(descriptor: int, most: int) -> bytes:
            assert select.select([descriptor], [], [], 0)[0], "this read would have waited"
            return read(descriptor, most)

        monkeypatch.setattr(os, "read", read_at_once)

    def peek(self, handle: int, size: int) -> tuple[int, int]:
        self.looked += 1
        if not select.select([handle], [], [], 0)[0]:
            return 0, 0
        waiting = struct.unpack("i", fcntl.ioctl(handle, termios.FIONREAD, b"\0" * 4))[0]
        if waiting == 0:
            raise BrokenPipeError(109, "the pipe has been ended")
        return waiting, 0


def test_on_windows_a_pipe_is_read_only_when_something_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = _FakeWindows(monkeypatch)
    out, into = os.pipe()
    late = threading.Timer(0.1, os.write, (into, b"go"))
    late.start()
    assert read_pipe(out, 64, poll_s=0.01) == b"go"
    assert windows.looked > 1
    os.close(into)
    assert read_pipe(out, 64, poll_s=0.01) == b""
    os.close(out)


@pytest.mark.parametrize("is_windows", [False, True])
def test_lines_come_whole_however_they_were_sent(is_windows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_windows:
        _FakeWindows(monkeypatch)
    out, into = os.pipe()
    lines = lines_from_parent(out, poll_s=0.01)
    os.write(into, b"steady 1.0\r\nste")
    assert next(lines) == "steady 1.0"
    os.write(into, "ady é\n\nno end".encode())
    assert [next(lines), next(lines)] == ["steady é", ""]
    os.close(into)
    assert list(lines) == []
    os.close(out)
