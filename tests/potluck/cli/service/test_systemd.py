"""The unit, by systemd's own reading of it where there is one; and what is done with it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from potluck.cli.service.manager import CommandResult
from potluck.cli.service.systemd import UNIT, Systemd, unit_text
from tests.support.service.scripted_manager import JOB, Scripted
from transport.errors import ConfigError

_MANAGER = Path("/usr/lib/systemd/systemd")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Another user's too, who reads it."""
    with tempfile.TemporaryDirectory(prefix="pl-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.fixture(autouse=True)
def config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
@pytest.mark.parametrize("keeps_trying", [False, True])
def test_systemd_has_nothing_to_say_against_the_unit(keeps_trying: bool, folder: Path) -> None:
    job = replace(JOB, command=("/bin/sh", *JOB.command[1:]), retries_forever=keeps_trying)
    (folder / UNIT).write_text(unit_text(job))
    assert _verified(folder) == ""
    (folder / UNIT).write_text(unit_text(job).replace("KillMode", "KillMood"))
    assert "KillMood" in _verified(folder)


def _verified(folder: Path) -> str:
    command = ["systemd-analyze", "verify", "--user", str(folder / UNIT)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=400, check=False)
    return done.stdout + done.stderr


@pytest.mark.skipif(not _MANAGER.exists(), reason="there is no systemd here")
def test_systemd_reads_every_word_as_it_was_meant(folder: Path) -> None:
    """By its own test run, which starts nothing."""
    (folder / UNIT).write_text(unit_text(JOB))
    as_user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.getuid() == 0 else []
    done = subprocess.run(
        [*as_user, str(_MANAGER), "--user", "--test", "--unit", UNIT],
        env=os.environ | {"HOME": str(folder), "SYSTEMD_UNIT_PATH": f"{folder}:/usr/lib/systemd/user"},
        capture_output=True,
        encoding="utf-8",
        timeout=400,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"systemd's test run does not work here: {done.stderr[-200:]}")
    lines = [line.strip() for line in done.stdout.splitlines()]
    environment = [line for line in lines if line.startswith("Environment: POTLUCK")]
    assert environment == [f"Environment: POTLUCK_HOME={JOB.environment['POTLUCK_HOME']}"]
    command = next(line for line in lines if line.startswith("Command Line: ") and "potluck" in line)
    words = shlex.split(command.removeprefix("Command Line: ").replace("\\$", "$"))
    assert [word.replace("$$", "$") for word in words] == list(JOB.command)  # $$ is undone when it is started.


def test_it_stops_trying_what_fails_but_waits_for_a_head_for_ever() -> None:
    assert "StartLimitBurst=5" in unit_text(JOB)
    assert "StartLimitIntervalSec=0" in unit_text(replace(JOB, retries_forever=True))
    assert "Restart=on-failure" in unit_text(JOB)


def test_a_program_whose_path_systemd_would_change_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\$"):
        unit_text(replace(JOB, command=("/opt/$HOME/python",)))


def test_installed_started_and_removed(config: Path) -> None:
    run = Scripted({"systemctl --user is-active": CommandResult(exit_code=0, output="active")})
    systemd = Systemd(run)
    assert systemd.state().file is None
    done = systemd.install(JOB, start=True)
    assert systemd.file == config / "systemd" / "user" / UNIT
    assert systemd.file.read_text(encoding="utf-8") == unit_text(JOB)
    assert run.asked[-1] == f"systemctl --user restart {UNIT}"
    assert any("enable-linger" in command for command in done.next_commands)
    assert systemd.state().is_running is True
    systemd.uninstall()
    assert not systemd.file.exists() and f"systemctl --user disable --now {UNIT}" in run.asked
    assert systemd.uninstall().messages == ("No service is installed.",)


def test_without_a_session_it_says_what_to_do_by_hand() -> None:
    nobody = CommandResult(exit_code=1, output="Failed to connect to bus: No medium found")
    systemd = Systemd(Scripted({"systemctl": nobody}))
    done = systemd.install(JOB, start=True)
    assert "No medium found" in done.messages[0]
    assert done.next_commands[0] == "systemctl --user daemon-reload" and UNIT in done.next_commands[2]
    assert systemd.file.exists()
    assert systemd.state().is_running is None
    systemd.uninstall()
    assert not systemd.file.exists()


def test_without_systemd_it_says_what_to_run_instead() -> None:
    systemd = Systemd(Scripted({"systemctl": CommandResult(exit_code=None, output="No such file or directory")}))
    with pytest.raises(ConfigError, match="no systemd") as refused:
        systemd.install(JOB, start=True)
    assert "potluck up" in refused.value.hint and not systemd.file.exists()


def test_a_link_in_its_place_is_replaced_not_followed(config: Path) -> None:
    systemd = Systemd(Scripted())
    other = config / "other"
    other.write_text("mine")
    systemd.file.parent.mkdir(parents=True)
    systemd.file.symlink_to(other)
    systemd.install(JOB, start=False)
    assert other.read_text() == "mine" and not systemd.file.is_symlink()
