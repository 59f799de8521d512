"""A child process is a Python module that can't outlive its parent."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from transport.process.child import detached_popen_kwargs, python_command, python_environment, thread_environment

_TERMINATE_TIMEOUT_S = 1.5
_KILL_TIMEOUT_S = 1.0


class ChildProcess:
    """A Python module run as a process, with a lifeline on its standard input (see `transport.process.child`).

    A Ctrl-C in the terminal reaches only the parent, which then stops it in order. To be terminated ends it at once on
    every system: it holds nothing that must be put away, sockets' files apart, and those are its parent's.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], *, log: Path, threads: int = 1, inherited_fds: Sequence[int] = ()
    ) -> None:
        """`inherit` are descriptors that the child gets under the same numbers; Windows has no such thing."""
        self.log = log
        environment = {
            **os.environ,
            **thread_environment(threads, os.environ),
            **python_environment(),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*python_command(), module, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment,
                pass_fds=tuple(inherited_fds),
                **detached_popen_kwargs(),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that ended it (on Windows, 1 if it was terminated)."""
        return self._process.poll()

    def last_log_line(self) -> str:
        """The last line of its log, for an error message."""
        with contextlib.suppress(OSError):
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            if lines:
                return lines[-1]
        return ""

    def terminate(self) -> None:
        if self.exit_code() is None:
            self._process.terminate()

    def kill(self) -> None:
        if self.exit_code() is None:
            self._process.kill()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it has ended; None waits for as long as that takes."""
        try:
            self._process.wait(None if timeout_s is None else max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            return False
        return True


def stop_processes(children: Iterable[ChildProcess]) -> None:
    """End children and see that they are gone. Returns within about 3 s.

    Their lifelines stay open until then: one that ends means that this process has crashed, and they would clean up.
    """
    children = list(children)
    for action, patience_s in ((ChildProcess.terminate, _TERMINATE_TIMEOUT_S), (ChildProcess.kill, _KILL_TIMEOUT_S)):
        for child in children:
            with contextlib.suppress(OSError):  # Whatever the system says of one, the others end too.
                action(child)
        deadline = time.monotonic() + patience_s
        for child in children:
            child.wait(deadline - time.monotonic())
