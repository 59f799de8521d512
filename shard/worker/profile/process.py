"""A profile in a child process, as its parent sees it: a crash or a hang there is an error here."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shard.worker.profile.report import ProfileSettings
from transport.errors import DeadlineExceeded, StageFailed, error_from_code
from transport.messages.measure import ProfileReport, read_report
from transport.process.child import detached_popen_kwargs, python_command, python_environment

SILENCE_S = 90.0
"""Longer than importing torch and transformers takes on a quarter of a slow core."""


class ProfileProcess:
    """Starts at once. It ends with `close`, or with this process: its standard input is its lifeline."""

    def __init__(self, model: Path, settings: ProfileSettings, *, threads: int, silence_s: float = SILENCE_S) -> None:
        self._silence_s = silence_s
        self._closed = False
        command = [*python_command(), "shard.worker.profile", "--serve", "--model", str(model)]
        command += ["--backend", settings.backend, "--device", settings.device, "--dtype", settings.dtype]
        command += ["--threads", str(threads), "--budget", str(settings.budget_s), "--weights", settings.weights]
        if settings.memory_bytes is not None:
            command += ["--memory", str(settings.memory_bytes)]
        if settings.dummy_weights:
            command.append("--dummy-weights")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env=os.environ | python_environment(),
            **detached_popen_kwargs(),
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._errors: list[str] = []
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_lines, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def report(self, on_progress: Callable[[str], None] = lambda what: None) -> ProfileReport:
        """What was measured. Raises PotluckError: the profile's own, or that it crashed, hangs or talks nonsense."""
        while True:
            match self._next_message():
                case {"doing": str(what)}:
                    on_progress(what)
                case {"report": dict(report)}:
                    return read_report(report)
                case fact:
                    raise StageFailed(f"the profile said {fact!r}")

    def measure_under_load(self, seconds: float) -> float:
        """Seconds of a step of the profiled layers, run over and over for `seconds`. After `report`."""
        with contextlib.suppress(OSError):  # It has died meanwhile: the next fact says so.
            assert self._process.stdin is not None
            self._process.stdin.write(f"steady {seconds}\n")
            self._process.stdin.flush()
        match self._next_message():
            case {"steady_s": float(step_s)}:
                return step_s
            case fact:
                raise StageFailed(f"the profile said {fact!r}")

    def close(self) -> None:
        """End it, from whatever thread: who waits for it is told that it has ended."""
        if self._closed:
            return
        self._closed = True
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join(1.0)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _next_message(self) -> dict[str, Any]:
        ends_at = time.monotonic() + self._silence_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, ends_at - time.monotonic()))
            except queue.Empty:
                self.close()
                raise DeadlineExceeded(
                    f"the profile said nothing for {self._silence_s:.0f} s", hint="is the device in use, or stuck?"
                ) from None
            if not line:
                self._lines.put("")  # For whoever asks next.
                raise self._exit_error()
            with contextlib.suppress(ValueError):  # What a library prints is not for us.
                fact = json.loads(line)
                if isinstance(fact, dict) and isinstance(error := fact.get("error"), dict):
                    raise error_from_code(str(error.get("code")), str(error.get("message")), str(error.get("hint")))
                if isinstance(fact, dict):
                    return fact

    def _exit_error(self) -> StageFailed:
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return StageFailed("the profile closed its output and goes on")
        self._readers[1].join(1.0)
        if code < 0:
            hint = "the system was out of memory, if nobody killed it: lower --memory" if code == -9 else ""
            return StageFailed(f"the profile was ended by signal {-code}", hint=hint)
        words = f": {self._errors[-1]}" if self._errors else ""
        return StageFailed(f"the profile ended with exit code {code}{words}")

    def _read_lines(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # Closed while it was read.
            for line in self._process.stdout:
                if line.strip():
                    self._lines.put(line.strip())
        self._lines.put("")

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with contextlib.suppress(ValueError):
            for line in self._process.stderr:
                if line.strip():
                    self._errors = [*self._errors[-9:], line.strip()]
