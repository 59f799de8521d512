"""The task of Windows, as an XML parser reads it; schtasks is scripted. Whether Windows takes it is not proven here."""

from __future__ import annotations

import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from potluck.cli.service import task_scheduler
from potluck.cli.service.manager import CommandResult
from potluck.cli.service.task_scheduler import TaskScheduler, task_xml
from tests.support.service.scripted_manager import JOB, NASTY, Scripted

_NS = {"t": "http://schemas.microsoft.com/windows/2004/02/mit/task"}


@pytest.fixture(autouse=True)
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(task_scheduler, "own_data_dir", lambda: tmp_path)
    return tmp_path


def test_every_word_reads_as_it_was_meant() -> None:
    task = ElementTree.fromstring(task_xml(JOB, account="PC\\me & you").encode("utf-16"))
    assert task.findtext(".//t:Exec/t:Command", namespaces=_NS) == JOB.command[0]
    arguments = task.findtext(".//t:Exec/t:Arguments", namespaces=_NS)
    assert arguments == subprocess.list2cmdline(["-P", "-m", "potluck", "up", *NASTY])
    assert task.findtext(".//t:LogonTrigger/t:UserId", namespaces=_NS) == "PC\\me & you"
    assert task.findtext(".//t:ExecutionTimeLimit", namespaces=_NS) == "PT0S"
    assert task.findtext(".//t:DisallowStartIfOnBatteries", namespaces=_NS) == "false"


def test_installed_asked_and_removed(own_data: Path) -> None:
    run = Scripted({"schtasks /Query": CommandResult(exit_code=0, output='"\\Potluck","N/A","Running"')})
    tasks = TaskScheduler(run)
    done = tasks.install(JOB, start=True)
    assert any("setx POTLUCK_HOME" in line for line in done.messages)
    assert run.asked[0] == f"schtasks /Create /TN Potluck /XML {own_data / 'service.xml'} /F"
    assert tasks.state().is_running is True
    tasks.uninstall()
    assert run.asked[-1] == "schtasks /Delete /TN Potluck /F"
    assert tasks.state().file is None


def test_what_windows_refuses_is_told_with_the_command() -> None:
    run = Scripted({"schtasks /Create": CommandResult(exit_code=1, output="ERROR: Access is denied.")})
    done = TaskScheduler(run).install(JOB, start=True)
    assert "Access is denied" in done.messages[-1] and done.next_commands[0].startswith("schtasks /Create")
