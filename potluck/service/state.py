"""What an installed service is like, whichever system keeps it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from potluck.service.job import Job

_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """How a command ended; None if there is no such command, or it did not end in time."""

    code: int | None
    output: str

    @property
    def is_well(self) -> bool:
        return self.code == 0


Run = Callable[[Sequence[str]], Ran]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceState:
    """`is_running` and `starts_by_itself` are None where the system could not be asked."""

    file: Path | None
    is_running: bool | None
    starts_by_itself: bool | None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What was done, and what is left for the user to do: commands, with why."""

    said: tuple[str, ...] = ()
    to_do: tuple[str, ...] = ()


class Keeper(Protocol):
    """What starts a user's programs on one system."""

    @property
    def file(self) -> Path:
        """Where the service is written down."""
        ...

    def text(self, job: Job) -> str:
        """What is written there. Raises ConfigError for what can't be."""
        ...

    def install(self, job: Job, *, start: bool) -> Done: ...

    def uninstall(self) -> Done:
        """Stop it, and forget it. Nothing happens where none is installed."""
        ...

    def state(self) -> ServiceState: ...


def run_command(command: Sequence[str]) -> Ran:
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=_DEADLINE_S,
            check=False,
        )
    except OSError as error:
        return Ran(code=None, output=error.strerror or str(error))
    except subprocess.TimeoutExpired:
        return Ran(code=None, output=f"no answer within {_DEADLINE_S:.0f} s")
    return Ran(code=done.returncode, output=done.stdout.strip())
