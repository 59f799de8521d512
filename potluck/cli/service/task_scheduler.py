"""A task of Windows' Task Scheduler, as XML: https://learn.microsoft.com/windows/win32/taskschd/task-scheduler-schema.

Only so can it be told not to end the task after three days, nor on battery, which are its defaults.
"""

from __future__ import annotations

import getpass
import os
import subprocess
from pathlib import Path
from xml.etree import ElementTree

from potluck.cli.service.manager import (
    RunCommand,
    ServiceJob,
    ServiceOutcome,
    ServiceState,
    check_printable,
    remove_file,
    run_command,
    write_service_file,
)
from potluck.system.paths import own_data_dir

TASK = "Potluck"
_NAMESPACE = "http://schemas.microsoft.com/windows/2004/02/mit/task"


class TaskScheduler:
    def __init__(self, run: RunCommand = run_command) -> None:
        self._run = run

    @property
    def file(self) -> Path:
        return own_data_dir() / "service.xml"

    def text(self, job: ServiceJob) -> str:
        return task_xml(job, account=_account())

    def install(self, job: ServiceJob, *, start: bool) -> ServiceOutcome:
        write_service_file(self.file, self.text(job).encode("utf-16"))
        said = tuple(
            f"A task sees what is set for your account, not what is set in this terminal alone: setx {name}"
            for name in job.environment
        )
        create = ["schtasks", "/Create", "/TN", TASK, "/XML", str(self.file), "/F"]
        for command in [create, ["schtasks", "/Run", "/TN", TASK]] if start else []:
            ran = self._run(command)
            if not ran.succeeded:
                return ServiceOutcome(
                    messages=(*said, f"Task Scheduler refused: {ran.output or 'no answer'}"),
                    next_commands=(subprocess.list2cmdline(command),),
                )
        if not start:
            return ServiceOutcome(messages=said, next_commands=(subprocess.list2cmdline(create),))
        return ServiceOutcome(
            messages=(*said, "It is started, in a window of its own, and will be whenever you log in.")
        )

    def uninstall(self) -> ServiceOutcome:
        if not remove_file(self.file):
            return ServiceOutcome(messages=("No service is installed.",))
        self._run(["schtasks", "/End", "/TN", TASK])
        gone = self._run(["schtasks", "/Delete", "/TN", TASK, "/F"])
        return ServiceOutcome(messages=("It is stopped and removed.",) if gone.succeeded else ("Its file is removed.",))

    def state(self) -> ServiceState:
        if not self.file.is_file():
            return ServiceState(file=None, is_running=False, starts_by_itself=False)
        ran = self._run(["schtasks", "/Query", "/TN", TASK, "/FO", "CSV", "/NH"])
        if not ran.succeeded:
            return ServiceState(file=self.file, is_running=None, starts_by_itself=False, detail=ran.output)
        # The words are in the language of the system, so that only the English one is understood.
        status = ran.output.rpartition(",")[2].strip('" ')
        is_running = {"Running": True, "Ready": False, "Disabled": False}.get(status)
        return ServiceState(file=self.file, is_running=is_running, starts_by_itself=status != "Disabled", detail=status)


def task_xml(job: ServiceJob, *, account: str) -> str:
    """Started when `account` logs in, with its own rights, and again a minute after it failed."""
    task = ElementTree.Element("Task", {"version": "1.2", "xmlns": _NAMESPACE})
    _add(task, "RegistrationInfo", {"Description": f"Potluck: {job.description}"})
    _add(_add(task, "Triggers"), "LogonTrigger", {"Enabled": "true", "UserId": account})
    rights = {"UserId": account, "LogonType": "InteractiveToken", "RunLevel": "LeastPrivilege"}
    _add(_add(task, "Principals"), "Principal", rights).set("id", "Author")
    settings = {
        "MultipleInstancesPolicy": "IgnoreNew",
        "DisallowStartIfOnBatteries": "false",
        "StopIfGoingOnBatteries": "false",
        "ExecutionTimeLimit": "PT0S",
    }
    restart = {"Interval": "PT1M", "Count": "999" if job.retries_forever else "5"}
    _add(_add(task, "Settings", settings), "RestartOnFailure", restart)
    program, *arguments = job.command
    actions = _add(task, "Actions")
    actions.set("Context", "Author")
    _add(actions, "Exec", {"Command": program, "Arguments": subprocess.list2cmdline(arguments)})
    ElementTree.indent(task)
    return f'<?xml version="1.0" encoding="UTF-16"?>\n{ElementTree.tostring(task, encoding="unicode")}\n'


def _account() -> str:
    """Without it, it would be at anybody's log-in, which takes an administrator."""
    domain = os.environ.get("USERDOMAIN", "")
    return check_printable(f"{domain}\\{getpass.getuser()}" if domain else getpass.getuser())


def _add(parent: ElementTree.Element, tag: str, texts: dict[str, str] | None = None) -> ElementTree.Element:
    added = ElementTree.SubElement(parent, tag)
    for name, text in (texts or {}).items():
        ElementTree.SubElement(added, name).text = text
    return added
