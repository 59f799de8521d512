"""Runs the `potluck` command as a user would, in folders of its own, and looks at what it leaves behind."""

from __future__ import annotations

import io
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import psutil

from potluck.cli.app import main

# What takes seconds on a quiet machine may take minutes on a busy one: these are to end a hang, not to measure.
READY_S = 240.0
GONE_S = 120.0
ASK_S = 120.0
_SAID = "stderr-"
DEMO_DEVICES = ("--device", "torch:cpu", "--device", "mlx", "--device", "torch:cpu")
COMMAND = [sys.executable, "-P", "-m", "potluck"]


class Done(NamedTuple):
    """As `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """Where one user's Potluck keeps its things: the store may be shared by tests, the sockets may not."""

    data: Path
    runtime: Path

    def environment(self) -> dict[str, str]:
        config = self.runtime / "config.toml"
        if self.runtime.is_dir() and not config.exists():
            config.write_text("lan = false\ndiscovery = false\n")  # No test speaks to this machine's own network.
        return {
            **os.environ,
            "POTLUCK_HOME": str(self.data),
            "POTLUCK_RUNTIME": str(self.runtime),
            "POTLUCK_CONFIG": str(self.runtime / "config.toml"),
            "COLUMNS": "160",
        }

    def run(self, *arguments: str, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
        """A command that ends by itself."""
        return subprocess.run(
            [*COMMAND, *arguments],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def run_here(self, *arguments: str) -> Done:
        """The same in this process."""
        return run_here(*arguments, environment=self.environment())

    def processes(self) -> list[psutil.Process]:
        """Every process that was started with these folders, told by its environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("POTLUCK_RUNTIME") == str(self.runtime) and process.pid != os.getpid():
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def leftovers(self) -> list[str]:
        """Processes, and anything in the runtime folder but the lock, the config and what `Running` writes there."""
        ours = ("head.lock", "config.toml")
        files = [
            str(path) for path in self.runtime.rglob("*") if path.name not in ours and not path.name.startswith(_SAID)
        ]
        return [" ".join(process.cmdline()) for process in self.processes()] + files


class Running:
    """A `potluck` command that serves. Its stdout lines of JSON are facts, the others `words`; `stop` ends it as Ctrl-C
    does."""

    def __init__(self, home: Home, *arguments: str, command: Sequence[str] = COMMAND) -> None:
        self.home = home
        self.lines: list[str] = []
        self.words: list[str] = []
        self.log = (home.runtime / f"{_SAID}{secrets.token_hex(4)}").open("w+")
        self.process = subprocess.Popen(
            [*command, *arguments],
            env=home.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def facts(self, timeout_s: float = READY_S) -> dict[str, Any]:
        """The first JSON object on stdout: the command is up."""
        wait_until(lambda: bool(self.lines) or self.process.poll() is not None, timeout_s, self.said)
        assert self.lines, f"ended with {self.process.returncode}: {self.said()}"
        facts: dict[str, Any] = json.loads(self.lines[0])
        return facts

    def said(self) -> str:
        return "".join(self.words) + Path(self.log.name).read_text()

    def stop(self, number: signal.Signals = signal.SIGINT, timeout_s: float = GONE_S) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout_s)
        self.log.close()
        return code

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.lines.append(line)
            else:
                self.words.append(line)


def run_here(*arguments: str, environment: Mapping[str, str] | None = None) -> Done:
    """A command in this process: what starts no other one, and is refused or planned, need not be imported anew."""
    out, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, environment or {}),
        mock.patch.object(sys, "argv", ["potluck", *arguments]),
        redirect_stdout(out),
        redirect_stderr(errors),
    ):
        code: object = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
    return Done(int(str(code or 0)), out.getvalue(), errors.getvalue())


def wait_until(true: Callable[[], bool], timeout_s: float, describe: Callable[[], object] = str) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {describe()}"
        time.sleep(0.05)


def up_arguments(*extra: str, devices: Sequence[str] = DEMO_DEVICES) -> list[str]:
    # Quick, and the devices in the order given: what is measured and solved has tests of its own.
    plan = ("--use-all", "--estimate", "--objective", "proportional")
    return ["up", "smollm2", *devices, *plan, "--threads", "1", "--port", "0", "--json", *extra]


def make_home(data: Path) -> Home:
    # A socket's path is short: pytest's own temporary folders are not.
    return Home(data=data, runtime=Path(tempfile.mkdtemp(prefix="plt-")))
