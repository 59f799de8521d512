"""A user's service of systemd. Units: https://www.freedesktop.org/software/systemd/man/systemd.service.html (Command
lines: quoting, and what % and $ mean there)."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

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
from transport.errors import ConfigError

UNIT = "potluck.service"


class Systemd:
    def __init__(self, run: RunCommand = run_command) -> None:
        self._run = run

    @property
    def file(self) -> Path:
        base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        return Path(base) / "systemd" / "user" / UNIT

    def text(self, job: ServiceJob) -> str:
        return unit_text(job)

    def install(self, job: ServiceJob, *, start: bool) -> ServiceOutcome:
        if self._run(["systemctl", "--version"]).exit_code is None:
            raise ConfigError("there is no systemd here", hint=f"have this system run: {shlex.join(job.command)}")
        write_service_file(self.file, unit_text(job).encode())
        reload = ["systemctl", "--user", "daemon-reload"]
        # Once running, a new file counts from its next start on.
        starting = [["systemctl", "--user", "enable", UNIT], ["systemctl", "--user", "restart", UNIT]]
        linger = "loginctl enable-linger    (to have it run while you are not logged in)"
        commands = [reload, *(starting if start else ())]
        for number, command in enumerate(commands):
            ran = self._run(command)
            if not ran.succeeded:
                rest = tuple(" ".join(left) for left in [reload, *starting][number:])
                return ServiceOutcome(
                    messages=(f"systemd could not be told: {_last_line(ran.output)}",), next_commands=(*rest, linger)
                )
        if start:
            return ServiceOutcome(
                messages=("It is started, and will be whenever you log in.",), next_commands=(linger,)
            )
        return ServiceOutcome(next_commands=(*(" ".join(command) for command in starting), linger))

    def uninstall(self) -> ServiceOutcome:
        if not self.file.is_file() and not self.file.is_symlink():
            return ServiceOutcome(messages=("No service is installed.",))
        stopped = self._run(["systemctl", "--user", "disable", "--now", UNIT])
        remove_file(self.file)
        # Should systemd not answer, what "enable" has linked is of no use any more.
        remove_file(self.file.parent / "default.target.wants" / UNIT)
        self._run(["systemctl", "--user", "daemon-reload"])
        said = ("It is stopped and removed.",) if stopped.succeeded else ("Its file is removed.",)
        return ServiceOutcome(
            messages=said, next_commands=() if stopped.succeeded else (f"systemctl --user stop {UNIT}",)
        )

    def state(self) -> ServiceState:
        if not self.file.is_file():
            return ServiceState(file=None, is_running=False, starts_by_itself=False)
        active = self._run(["systemctl", "--user", "is-active", UNIT])
        enabled = self._run(["systemctl", "--user", "is-enabled", UNIT])
        is_known = active.output in ("active", "activating", "inactive", "failed", "deactivating", "reloading")
        return ServiceState(
            file=self.file,
            is_running=active.output in ("active", "reloading") if is_known else None,
            starts_by_itself=enabled.output == "enabled" if is_known else None,
            detail=active.output if is_known else _last_line(active.output),
        )


def unit_text(job: ServiceJob) -> str:
    """Stopped by a signal to its main process, which ends the others in order. `potluck up` that fails five times in
    ten minutes is left alone; `potluck join` goes on trying."""
    limit = "StartLimitIntervalSec=0" if job.retries_forever else "StartLimitIntervalSec=600\nStartLimitBurst=5"
    environment = "".join(f"Environment={quoted(f'{name}={value}')}\n" for name, value in job.environment.items())
    program, *arguments = job.command
    if "$" in program:
        raise ConfigError(f"systemd can't start {program}: its path has a $", hint="install Potluck in another folder")
    command = " ".join([quoted(program), *(quoted(argument).replace("$", "$$") for argument in arguments)])
    return f"""[Unit]
Description=Potluck, which {"joins a head" if job.retries_forever else "serves a model"}
{limit}

[Service]
{environment}ExecStart={command}
KillMode=mixed
TimeoutStopSec=20
SuccessExitStatus=130
Restart=on-failure
RestartSec=15

[Install]
WantedBy=default.target
"""


def quoted(text: str) -> str:
    """One word of a unit's line: systemd replaces nothing in it, but for $, which counts in command lines only."""
    escaped = check_printable(text).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def _last_line(text: str) -> str:
    return text.splitlines()[-1] if text else "no answer"
