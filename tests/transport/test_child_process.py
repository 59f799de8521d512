"""How children are started, here and as if on Windows."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from transport.process.child import detached_popen_kwargs, python_command, python_environment


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
