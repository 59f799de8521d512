"""The agent of a Mac, as plistlib reads it; launchctl is scripted."""

from __future__ import annotations

import plistlib
from pathlib import Path

import pytest

from potluck.cli.service.launchd import LABEL, Launchd
from potluck.cli.service.manager import CommandResult
from tests.support.service.scripted_manager import JOB, Scripted


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("POTLUCK_HOME", str(tmp_path / "store"))
    return tmp_path


def test_every_word_reads_as_it_was_meant(home: Path) -> None:
    agent = plistlib.loads(Launchd(Scripted()).text(JOB).encode())
    assert agent["ProgramArguments"] == list(JOB.command)
    assert agent["EnvironmentVariables"] == JOB.environment
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["Label"] == LABEL
    assert not (home / "store").exists()  # To look at it makes no folders.


def test_installed_over_the_one_before_and_removed(home: Path) -> None:
    busy = [
        CommandResult(exit_code=5, output="Bootstrap failed: 5: Input/output error"),
        CommandResult(exit_code=0, output=""),
    ]

    class Slow(Scripted):
        def __call__(self, command: object) -> CommandResult:
            ran = super().__call__(command)  # type: ignore[arg-type]
            return busy.pop(0) if "bootstrap" in self.asked[-1] and busy else ran

    run, slept = Slow({"launchctl print": CommandResult(exit_code=0, output="gui/1/x = {\n\tstate = running\n}")}), []
    launchd = Launchd(run, slept.append)
    done = launchd.install(JOB, start=True)
    assert done.next_commands == () and slept == [1.0]
    assert launchd.file == home / "Library" / "LaunchAgents" / f"{LABEL}.plist"
    assert (home / "store" / "logs").is_dir()
    assert launchd.state().is_running is True
    launchd.uninstall()
    assert not launchd.file.exists() and run.asked[-1].startswith("launchctl bootout gui/")


def test_without_a_session_it_says_what_to_do_by_hand() -> None:
    launchd = Launchd(
        Scripted({"launchctl": CommandResult(exit_code=125, output="Domain does not support specified action")})
    )
    done = launchd.install(JOB, start=True)
    assert "Domain does not support" in done.messages[0] and "bootstrap" in done.next_commands[0]
    assert launchd.state().is_running is False
