"""Running processes of Potluck on this host are found by their command lines and their home folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from potluck.system.paths import home_dir, own_data_dir
from transport.errors import AlreadyRunning

_MODULES = ("potluck", "potluck.cli", "potluck.engine.process", "shard.worker")
_SCRIPTS = ("potluck", "potluck.exe")


@dataclass(frozen=True, slots=True, kw_only=True)
class PotluckProcess:
    """A process, and what it was told to do: "up", "join", "shard.worker"."""

    pid: int
    command: str


def check_not_running(home: Path) -> None:
    """Raises AlreadyRunning if processes of this user work with that folder. A head is told by its lock besides."""
    users = list(processes_using(home))
    if users:
        named = ", ".join(f"{user.command} (process {user.pid})" for user in users[:4])
        raise AlreadyRunning(
            f"Potluck is running here: {named}",
            hint="stop it with Ctrl-C in its terminal, or with: potluck service uninstall",
        )
    for lock in sorted((home / "locks").glob("*.lock")) if not (home / "locks").is_symlink() else []:
        if not _is_free(lock):
            raise AlreadyRunning(f"somebody works on the model {lock.stem}", hint="wait until the pull is done")


def processes_using(home: Path) -> Iterator[PotluckProcess]:
    own = _with_parents(os.getpid())
    for process in psutil.process_iter():
        try:
            does = parse_command_line(process.cmdline()) if process.pid not in own else None
            if does is not None and _uses(process.environ(), home):
                yield PotluckProcess(pid=process.pid, command=does)
        except (psutil.Error, OSError):
            continue  # Another user's, or just gone.


def joining_processes() -> tuple[int, ...]:
    """Other processes of this user that give this host's devices to a head: `potluck join`, by hand or as a service."""
    return tuple(user.pid for user in processes_using(home_dir()) if user.command == "potluck join")


def parse_command_line(command: Sequence[str]) -> str | None:
    """What a process of Potluck is told to do by its command line; None for any other process."""
    for index, word in enumerate(command[:6]):
        rest = command[index + 1 :]
        if word == "-m" and rest and rest[0] in _MODULES:
            return _first_word(rest[1:], rest[0]) if rest[0] in ("potluck", "potluck.cli") else rest[0]
        if index < 2 and Path(word).name in _SCRIPTS:  # The script itself, or an interpreter's first argument.
            return _first_word(rest, "potluck")
    return None


def _first_word(words: Sequence[str], otherwise: str) -> str:
    return f"potluck {next((word for word in words if not word.startswith('-')), '')}".strip() or otherwise


def _uses(environment: dict[str, str], home: Path) -> bool:
    chosen = environment.get("POTLUCK_HOME")
    if chosen:
        return Path(chosen).resolve() == home.resolve()
    # Where its data lie follows from these.
    is_alike = all(environment.get(name) == os.environ.get(name) for name in ("HOME", "XDG_DATA_HOME", "LOCALAPPDATA"))
    return is_alike and own_data_dir().resolve() == home.resolve()


def _with_parents(pid: int) -> Iterable[int]:
    """This process, and those that started it: on Windows a script is two processes."""
    try:
        return {pid, *(parent.pid for parent in psutil.Process(pid).parents())}
    except psutil.Error:
        return {pid}


def _is_free(path: Path) -> bool:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    except OSError:
        return True  # Not ours to lock, and so to remove: that says more.
    lock.release()
    return True
