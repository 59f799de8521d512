"""A child process is a Python module of ours that can't outlive its parent; a LineChild speaks lines with it."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

from transport.process.child import detached_popen_kwargs, python_command, python_environment, thread_environment
from transport.timeouts import CHILD_EXIT_S, CHILD_KILL_S, CHILD_TERMINATE_S

_OFFLINE = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
"""For libraries that would ask a hub about a model that is here, or warn of threads before a fork."""

_KEPT_ERROR_LINES = 10


class ChildProcess:
    """A Python module run as a process. Its standard input is a pipe from here (see `start_parent_watch`).

    A Ctrl-C in the terminal reaches only the parent, which then stops it in order. To be terminated ends it at once on
    every system: it holds nothing that must be put away, sockets' files apart, and those are its parent's.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        *,
        log: Path | None = None,
        errors: int | None = subprocess.PIPE,
        threads: int | None = None,
        environment: Mapping[str, str] | None = None,
        inherited_fds: Sequence[int] = (),
    ) -> None:
        """What it prints goes to `log`; without one, its output comes by `stdout`, and its errors go to `errors`, as
        Popen has it. `environment` is this process's own if None; `inherited_fds` are descriptors that the child gets
        under the same numbers (Windows has no such thing)."""
        self._log = log
        own = os.environ if environment is None else environment
        with contextlib.ExitStack() as files:
            file = None if log is None else files.enter_context(log.open("ab"))
            self._process = subprocess.Popen(
                [*python_command(), module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if file is None else file,
                stderr=errors if file is None else file,
                env={
                    **own,
                    **({} if threads is None else thread_environment(threads, own)),
                    **python_environment(),
                    **_OFFLINE,
                },
                pass_fds=tuple(inherited_fds),
                **detached_popen_kwargs(),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> Path:
        assert self._log is not None, "what it prints goes elsewhere"
        return self._log

    @property
    def stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None, "it has a log"
        return self._process.stdout

    @property
    def stderr(self) -> IO[bytes]:
        assert self._process.stderr is not None, "its errors go elsewhere"
        return self._process.stderr

    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that ended it (on Windows, 1 if it was terminated)."""
        return self._process.poll()

    def last_log_line(self) -> str:
        """The last line of its log, for an error message."""
        with contextlib.suppress(OSError):
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return lines[-1] if lines else ""
        return ""

    def send(self, data: bytes) -> None:
        """Write to its standard input. If it has died, whoever reads from it is told so."""
        with contextlib.suppress(OSError, ValueError):
            self.stdin.write(data)
            self.stdin.flush()

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

    def close(self) -> None:
        """End it, and close its pipes."""
        self.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):  # What was still to be written has no reader.
                    stream.close()


def stop_processes(children: Iterable[ChildProcess]) -> None:
    """End children and see that they are gone. Returns within about 3 s.

    Their standard inputs stay open until then: one that ends means that this process has crashed, and they would clean
    up.
    """
    children = list(children)
    for action, patience_s in ((ChildProcess.terminate, CHILD_TERMINATE_S), (ChildProcess.kill, CHILD_KILL_S)):
        for child in children:
            with contextlib.suppress(OSError):  # Whatever the system says of one, the others end too.
                action(child)
        deadline = time.monotonic() + patience_s
        for child in children:
            child.wait(deadline - time.monotonic())


class LineChild:
    """A child that prints lines, read by threads: a pipe that is read can't be given a deadline. `close` from any
    thread."""

    def __init__(self, module: str, arguments: Sequence[str]) -> None:
        self._child = ChildProcess(module, arguments)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._errors: list[str] = []
        self._is_closed = False
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_lines, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def send(self, line: str) -> None:
        self._child.send(f"{line}\n".encode())

    def next_line(self, deadline_s: float) -> str | None:
        """The next line that is not empty; "" once there are no more, None at the deadline."""
        try:
            line = self._lines.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            return None
        if not line:
            self._lines.put("")  # For whoever asks next.
        return line

    def ended(self) -> tuple[int, str] | None:
        """How it ended, and its last line of errors; None if it goes on: it may close its output a moment before."""
        if not self._child.wait(CHILD_EXIT_S):
            return None
        self._readers[1].join(CHILD_EXIT_S)
        return self._child.exit_code() or 0, self._errors[-1] if self._errors else ""

    def close(self) -> None:
        """End it: who waits for a line is told that there are no more."""
        if self._is_closed:
            return
        self._is_closed = True
        self._child.kill()
        for reader in self._readers:
            reader.join(CHILD_EXIT_S)
        self._child.close()

    def _read_lines(self) -> None:
        with contextlib.suppress(ValueError):  # Closed while it was read.
            for line in self._child.stdout:
                if text := line.decode("utf-8", "replace").strip():
                    self._lines.put(text)
        self._lines.put("")

    def _read_errors(self) -> None:
        with contextlib.suppress(ValueError):
            for line in self._child.stderr:
                if text := line.decode("utf-8", "replace").strip():
                    self._errors = [*self._errors[1 - _KEPT_ERROR_LINES :], text]
