"""The pipe between a parent and its child, with real processes."""

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

from transport.process.child import EXIT_ORPHANED, lines_from_parent, read_pipe

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
