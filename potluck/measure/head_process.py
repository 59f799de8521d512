"""A head runs as a child process, here or in a lab's host, and its output is read."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from potluck.head.client import auth_headers

CLI = (sys.executable, "-P", "-m", "potluck")
_STOP_WITHIN_S = 15.0
END_SIGNALS = tuple(signal.Signals[name] for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Windows has no SIGHUP."""
UP_WITHIN_S = 3600.0
"""A head may have to download its model first."""

Popen = Callable[..., "subprocess.Popen[Any]"]


class CommandProcess:
    """`potluck` with some arguments, started by `popen` (subprocess.Popen, or a lab's). `heard` are the lines that it
    says, each with the second of `time.monotonic` when it came."""

    def __init__(self, arguments: Sequence[str], popen: Popen = subprocess.Popen) -> None:
        self._ready = threading.Event()
        self.lines: list[tuple[float, str]] = []
        self.facts: dict[str, Any] | None = None
        self._process = popen(
            [*CLI, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_output, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def wait_for_facts(self, timeout_s: float) -> dict[str, Any]:
        """The first JSON object that it prints: a head is up then. Raises RuntimeError with its last lines."""
        deadline = time.monotonic() + timeout_s
        while not self._ready.wait(0.1):
            if self._process.poll() is not None:
                self._readers[1].join(1.0)
                raise RuntimeError(f"exited with code {self._process.returncode}: {self.last_lines()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"not up within {timeout_s:.0f} s: {self.last_lines()}")
        assert self.facts is not None
        return self.facts

    def wait_for_file(self, file: Path, timeout_s: float) -> None:
        """Until it has written `file`. Raises RuntimeError with its last lines."""
        deadline = time.monotonic() + timeout_s
        while not file.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"it did not start: {self.last_lines()}")
            time.sleep(0.1)

    @property
    def output(self) -> str:
        return "".join(line for _, line in list(self.lines))

    def last_lines(self) -> str:
        return " ".join(line.strip() for _, line in self.lines[-6:])

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """As Ctrl-C does."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if self.facts is None and line.startswith("{"):
                self.facts = json.loads(line)
                self._ready.set()
            else:
                self.lines.append((time.monotonic(), line))

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append((time.monotonic(), line))


def stop_on_signals() -> None:
    """Treat signals that would end this process at once like Ctrl-C: a head that it started is stopped then."""
    for number in END_SIGNALS:
        signal.signal(number, signal.default_int_handler)


def status_of(url: str) -> dict[str, Any]:
    """The head's report. Raises httpx.HTTPError."""
    response = httpx.get(f"{url}/potluck/status", headers=auth_headers(), timeout=30.0, trust_env=False)
    response.raise_for_status()
    found: dict[str, Any] = response.json()
    return found
