"""A service manager installs, removes and reports a service; a job says what the service runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from potluck.store.sources import looks_like_path
from transport.errors import ConfigError
from transport.process.files import write_atomic


def write_service_file(path: Path, content: bytes) -> None:
    """Raises ConfigError. What is there already is replaced; a link itself is, not what it leads to."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content, private=False)
    except OSError as error:
        raise ConfigError(
            f"{path} can't be written: {error.strerror}", hint="--dry-run prints what would be written there"
        ) from error


def remove_file(path: Path) -> bool:
    """Whether it was there. Raises ConfigError."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"{path} can't be removed: {error.strerror}", hint="remove it by hand") from error
    return True


# Where things are; never a token or a key: the file is readable for others.
_VARIABLES = ("POTLUCK_HOME", "POTLUCK_CONFIG", "POTLUCK_RUNTIME", "HF_HOME", "CUDA_VISIBLE_DEVICES")
_PATH_VARIABLES = {"POTLUCK_HOME", "POTLUCK_CONFIG", "POTLUCK_RUNTIME", "HF_HOME"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceJob:
    """`keeps_trying`: what it waits for may be away for days, a head of another host for instance."""

    command: tuple[str, ...]
    environment: dict[str, str]
    retries_forever: bool
    description: str


def make_job(model: str | None, *, join: bool, environment: Mapping[str, str] = os.environ) -> ServiceJob:
    """`potluck up MODEL`, or `potluck join`. Raises ConfigError for what a service can't be told safely."""
    if join and model is not None:
        raise ConfigError("a service serves a model or joins a head", hint="give --model or --join, not both")
    if not join and not model:
        raise ConfigError("the service has nothing to do", hint="give --model MODEL to serve it, or --join")
    command = [sys.executable, "-P", "-m", "potluck", *(["join"] if join else ["up", _model(model or "")])]
    kept = {name: _value(name, environment[name]) for name in _VARIABLES if environment.get(name)}
    for text in (*command, *kept.values()):
        check_printable(text)
    return ServiceJob(
        command=tuple(command),
        environment=kept,
        retries_forever=join,
        description="joins the head it is paired with" if join else f"serves {command[-1]}",
    )


def check_printable(text: str) -> str:
    """The same text. Raises ConfigError for characters that would end a line or a string of a service's file."""
    if any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 or 0xD800 <= ord(char) < 0xE000 for char in text):
        raise ConfigError(f"{text!r} holds characters that a service's file can't", hint="rename it")
    return text


def _model(text: str) -> str:
    """As a service names it, which does not start in this folder."""
    if text.startswith("-"):
        raise ConfigError(f"{text!r} would be an option, not a model", hint="give a model: potluck list shows them")
    if text.startswith("file:"):
        return f"file:{Path(text.removeprefix('file:')).expanduser().absolute()}"
    return str(Path(text).expanduser().absolute()) if looks_like_path(text) else text


def _value(name: str, text: str) -> str:
    return str(Path(text).expanduser().absolute()) if name in _PATH_VARIABLES else text


_COMMAND_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandResult:
    """How a command ended; None if there is no such command, or it did not end in time."""

    exit_code: int | None
    output: str

    @property
    def succeeded(self) -> bool:
        return self.exit_code == 0


RunCommand = Callable[[Sequence[str]], CommandResult]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceState:
    """`is_running` and `starts_by_itself` are None where the system could not be asked."""

    file: Path | None
    is_running: bool | None
    starts_by_itself: bool | None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOutcome:
    """What was done, and what is left for the user to do: commands, with why."""

    messages: tuple[str, ...] = ()
    next_commands: tuple[str, ...] = ()


class ServiceManager(Protocol):
    """What starts a user's programs on one system."""

    @property
    def file(self) -> Path:
        """Where the service is written down."""
        ...

    def text(self, job: ServiceJob) -> str:
        """What is written there. Raises ConfigError for what can't be."""
        ...

    def install(self, job: ServiceJob, *, start: bool) -> ServiceOutcome: ...

    def uninstall(self) -> ServiceOutcome:
        """Stop it, and forget it. Nothing happens where none is installed."""
        ...

    def state(self) -> ServiceState: ...


def run_command(command: Sequence[str]) -> CommandResult:
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
    except OSError as error:
        return CommandResult(exit_code=None, output=error.strerror or str(error))
    except subprocess.TimeoutExpired:
        return CommandResult(exit_code=None, output=f"no answer within {_COMMAND_TIMEOUT_S:.0f} s")
    return CommandResult(exit_code=done.returncode, output=done.stdout.strip())
