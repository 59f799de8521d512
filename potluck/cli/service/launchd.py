"""launchd runs the service as a user's agent on a Mac; `man launchd.plist` explains the keys."""

from __future__ import annotations

import os
import plistlib
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from potluck.cli.service.manager import (
    RunCommand,
    ServiceJob,
    ServiceOutcome,
    ServiceState,
    remove_file,
    run_command,
    write_service_file,
)
from potluck.system.paths import home_dir, logs_dir

LABEL = "local.potluck"
_TRIES = 5


class Launchd:
    def __init__(self, run: RunCommand = run_command, sleep: Callable[[float], None] = time.sleep) -> None:
        self._run = run
        self._sleep = sleep

    @property
    def file(self) -> Path:
        return Path.home() / "Library" / "LaunchAgents" / f"{LABEL}.plist"

    def text(self, job: ServiceJob) -> str:
        return plistlib.dumps(launch_agent(job, log=home_dir() / "logs" / "service.log")).decode()

    def install(self, job: ServiceJob, *, start: bool) -> ServiceOutcome:
        logs_dir()  # launchd makes no folders.
        write_service_file(self.file, self.text(job).encode())
        bootstrap = ["launchctl", "bootstrap", _domain(), str(self.file)]
        if not start:
            return ServiceOutcome(next_commands=(shlex.join(bootstrap),))
        had_one = self._run(["launchctl", "bootout", _target()]).succeeded
        ran = self._run(bootstrap)
        for _ in range(_TRIES if had_one else 0):  # The one before takes a moment to end.
            if ran.succeeded:
                break
            self._sleep(1.0)
            ran = self._run(bootstrap)
        if not ran.succeeded:
            return ServiceOutcome(
                messages=(f"launchd could not be told: {ran.output or 'no answer'}",),
                next_commands=(f"{shlex.join(bootstrap)}    (in a terminal on the Mac itself)",),
            )
        return ServiceOutcome(messages=("It is started, and will be whenever you log in.",))

    def uninstall(self) -> ServiceOutcome:
        if not self.file.is_file() and not self.file.is_symlink():
            return ServiceOutcome(messages=("No service is installed.",))
        stopped = self._run(["launchctl", "bootout", _target()])
        remove_file(self.file)
        said = ("It is stopped and removed.",) if stopped.succeeded else ("Its file is removed; it was not running.",)
        return ServiceOutcome(messages=said)

    def state(self) -> ServiceState:
        if not self.file.is_file():
            return ServiceState(file=None, is_running=False, starts_by_itself=False)
        ran = self._run(["launchctl", "print", _target()])
        if ran.exit_code is None:
            return ServiceState(file=self.file, is_running=None, starts_by_itself=None, detail=ran.output)
        lines = [line.strip() for line in ran.output.splitlines()]
        detail = next((line for line in lines if line.startswith("state = ")), "not loaded")
        return ServiceState(
            file=self.file, is_running=detail == "state = running", starts_by_itself=ran.succeeded, detail=detail
        )


def launch_agent(job: ServiceJob, *, log: Path) -> dict[str, Any]:
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
