"""Another system as far as Python code can tell: `sys.platform`, and without the functions that it does not have.

What the system itself would do is not proven by it: only that our modules can be imported there, and which way they go.
"""

from __future__ import annotations

import sys

# os.name stays: pathlib would make paths of the other system, which this one can't open.
WINDOWS = """
import importlib.abc, os, signal, socket, sys
sys.platform = "win32"
MISSING = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog"}
WITHOUT = {
    os: ("getuid", "geteuid", "getgid", "fork", "forkpty", "killpg", "setsid", "getpgid", "preadv", "pread", "pwrite",
         "sched_getaffinity", "sched_setaffinity", "sched_setscheduler", "sched_param", "SCHED_BATCH", "SCHED_OTHER",
         "statvfs", "sysconf", "uname", "chown", "getloadavg", "wait4", "posix_fadvise", "mkfifo", "eventfd",
         "O_CLOEXEC", "O_NOFOLLOW", "O_DIRECTORY", "O_NONBLOCK", "fchmod", "memfd_create", "posix_fallocate"),
    signal: ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGSTOP", "SIGCONT", "SIGCHLD", "SIGALRM", "SIGQUIT",
             "pthread_sigmask", "setitimer", "alarm", "set_wakeup_fd"),
    socket: ("AF_UNIX", "SO_REUSEPORT", "CMSG_LEN", "recv_fds", "send_fds"),
}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
def become():
    for name in MISSING:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, Absent())
    for module, names in WITHOUT.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
"""

MACOS = """
import os, sys
sys.platform = "darwin"
def become():
    for name in ("sched_getaffinity", "sched_setaffinity", "sched_setscheduler", "sched_param", "SCHED_BATCH",
                 "posix_fadvise", "eventfd", "memfd_create", "posix_fallocate"):
        if hasattr(os, name):
            delattr(os, name)
"""

SYSTEMS = {"Windows": WINDOWS, "macOS": MACOS}


def program(system: str, *, before: str, after: str) -> list[str]:
    """A command that runs `before` here, for libraries that choose by the real system, and `after` as if there."""
    return [sys.executable, "-P", "-c", f"{before}\n{SYSTEMS[system]}\nbecome()\n{after}"]
