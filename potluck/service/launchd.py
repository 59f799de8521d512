"""A user's agent of launchd on a Mac. The keys are explained in `man launchd.plist`."""

from __future__ import annotations

import os
import plistlib
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from potluck.paths import home_dir, logs_dir
from potluck.service.files import remove_file, write_new
from potluck.service.job import Job
from potluck.service.state import Done, Run, ServiceState, run_command

LABEL = "local.potluck"
_TRIES = 5


class Launchd:
    def __init__(self, run: Run = run_command, sleep: Callable[[float], None] = time.sleep) -> None:
        self._run = run
        self._sleep = sleep

    @property
    def file(self) -> Path:
        return Path.home() / "Library" / "LaunchAgents" / f"{LABEL}.plist"

    def text(self, job: Job) -> str:
        return plistlib.dumps(agent_of(job, log=home_dir() / "logs" / "service.log")).decode()

    def install(self, job: Job, *, start: bool) -> Done:
        logs_dir()  # launchd makes no folders.
        write_new(self.file, self.text(job).encode())
        bootstrap = ["launchctl", "bootstrap", _domain(), str(self.file)]
        if not start:
            return Done(to_do=(shlex.join(bootstrap),))
        had_one = self._run(["launchctl", "bootout", _target()]).is_well
        ran = self._run(bootstrap)
        for _ in range(_TRIES if had_one else 0):  # The one before takes a moment to end.
            if ran.is_well:
                break
            self._sleep(1.0)
            ran = self._run(bootstrap)
        if not ran.is_well:
            return Done(
                said=(f"launchd could not be told: {ran.output or 'no answer'}",),
                to_do=(f"{shlex.join(bootstrap)}    (in a terminal on the Mac itself)",),
            )
        return Done(said=("It is started, and will be whenever you log in.",))

    def uninstall(self) -> Done:
        if not self.file.is_file() and not self.file.is_symlink():
            return Done(said=("No service is installed.",))
        stopped = self._run(["launchctl", "bootout", _target()])
        remove_file(self.file)
        said = ("It is stopped and removed.",) if stopped.is_well else ("Its file is removed; it was not running.",)
        return Done(said=said)

    def state(self) -> ServiceState:
        if not self.file.is_file():
            return ServiceState(file=None, is_running=False, starts_by_itself=False)
        ran = self._run(["launchctl", "print", _target()])
        if ran.code is None:
            return ServiceState(file=self.file, is_running=None, starts_by_itself=None, detail=ran.output)
        lines = [line.strip() for line in ran.output.splitlines()]
        detail = next((line for line in lines if line.startswith("state = ")), "not loaded")
        return ServiceState(
            file=self.file, is_running=detail == "state = running", starts_by_itself=ran.is_well, detail=detail
        )


def agent_of(job: Job, *, log: Path) -> dict[str, Any]:
    """Started at log-in, and again 15 s after it failed; computing at full speed, as an app of the user's may."""
    return {
        "Label": LABEL,
        "ProgramArguments": list(job.command),
        "EnvironmentVariables": dict(job.environment),
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 15,
        "ProcessType": "Interactive",
        "StandardOutPath": str(log),
        "StandardErrorPath": str(log),
    }


def _domain() -> str:
    return f"gui/{os.getuid()}"


def _target() -> str:
    return f"{_domain()}/{LABEL}"
