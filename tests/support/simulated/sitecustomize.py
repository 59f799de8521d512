"""Shows our modules, and no others, a system that is not this one: with this folder on PYTHONPATH and
POTLUCK_TEST_SYSTEM "Windows" or "macOS", in a process and all that it starts.

What the system itself would do is not proven by it: only which way our code goes there, and that it goes on to work.
"""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Callable
from typing import Any

OURS = ("transport", "devices", "planner", "shard", "potluck")
NOT_YET: dict[str, str] = {}
"""Modules that import what is not on Windows, so far."""

_POSIX = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}
_LINUX_ONLY = {"sched_getaffinity", "sched_setaffinity", "sched_setscheduler", "sched_param", "SCHED_BATCH"}
_LINUX_ONLY |= {"SCHED_OTHER", "posix_fadvise", "posix_fallocate", "eventfd", "memfd_create"}
_POSIX_OS = {"getuid", "geteuid", "getgid", "fork", "killpg", "setsid", "getpgid", "getpgrp", "tcgetpgrp", "preadv"}
_POSIX_OS |= {"pread", "pwrite", "statvfs", "sysconf", "uname", "fchmod", "fchown", "O_CLOEXEC", "O_NOFOLLOW"}
_POSIX_SIGNALS = {"SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGSTOP", "SIGCONT", "SIGCHLD", "SIGALRM", "SIGQUIT"}
_POSIX_SIGNALS |= {"pthread_sigmask", "setitimer", "ITIMER_REAL", "alarm"}
_POSIX_MMAP = {"MAP_PRIVATE", "MAP_ANONYMOUS", "MADV_DONTNEED", "MADV_FREE", "MADV_NOHUGEPAGE"}


class Seen:
    """A module as it is there: without what is missing, with what differs."""

    def __init__(self, real: Any, missing: set[str] = frozenset(), **other: Any) -> None:  # type: ignore[assignment]
        self.__dict__.update(_real=real, _missing=missing, **other)

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"module {self._real.__name__!r} has no attribute {name!r} on that system")
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)


def _peek(handle: int, size: int) -> tuple[int, int]:
    """As _winapi.PeekNamedPipe: bytes that wait, and an error at the pipe's end."""
    import fcntl
    import select
    import struct
    import termios

    if not select.select([handle], [], [], 0)[0]:
        return 0, 0
    (waiting,) = struct.unpack("i", fcntl.ioctl(handle, termios.FIONREAD, b"\0" * 4))
    if waiting == 0:
        raise BrokenPipeError(109, "the pipe has been ended")
    return waiting, 0


def _popen(*arguments: Any, creationflags: int = 0, **options: Any) -> Any:
    """Popen as Windows has it: flags, and neither sessions nor descriptors to pass on."""
    import subprocess

    assert not options.get("start_new_session") and not options.get("pass_fds"), "Windows has no such thing"
    return subprocess.Popen(*arguments, start_new_session=bool(creationflags & 0x200), **options)


def _as_on_windows(name: str) -> Any:
    if name in _POSIX:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    if name == "_winapi":
        return Seen(os, PeekNamedPipe=_peek)
    if name == "msvcrt":
        return Seen(os, get_osfhandle=lambda descriptor: descriptor)
    real = sys.modules.get(name)
    if real is None:
        return None
    match name:
        case "sys":
            return Seen(real, platform="win32")
        case "os":
            return Seen(real, _POSIX_OS | _LINUX_ONLY, name="nt")
        case "signal":
            return Seen(real, _POSIX_SIGNALS)
        case "socket":
            return Seen(real, {"AF_UNIX", "SO_REUSEPORT"}, SO_EXCLUSIVEADDRUSE=real.SO_REUSEADDR)
        case "mmap":
            return Seen(real, _POSIX_MMAP)
        case "subprocess":
            return Seen(real, Popen=_popen, CREATE_NEW_PROCESS_GROUP=0x200, CREATE_NO_WINDOW=0x08000000)
    return None


def _as_on_macos(name: str) -> Any:
    real = sys.modules.get(name)
    match name:
        case "sys":
            return Seen(real, platform="darwin")
        case "os":
            return Seen(real, _LINUX_ONLY)
        case "mmap" if real is not None:
            return Seen(real, {"MADV_NOHUGEPAGE"})
    return None


def _install(see: Callable[[str], Any]) -> None:
    original = builtins.__import__

    def imported(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        importer = (globals or {}).get("__name__", "")
        if globals and importer == "__main__" and globals.get("__spec__") is not None:
            importer = globals["__spec__"].name
        if level or importer.partition(".")[0] not in OURS or NOT_YET.get(importer) == name:
            return original(name, globals, locals, fromlist, level)
        if name not in _POSIX | {"_winapi", "msvcrt"}:
            original(name, globals, locals, fromlist, level)
        seen = see(name)
        return original(name, globals, locals, fromlist, level) if seen is None else seen

    builtins.__import__ = imported


_system = os.environ.get("POTLUCK_TEST_SYSTEM")
if _system is not None:
    _install({"Windows": _as_on_windows, "macOS": _as_on_macos}[_system])
