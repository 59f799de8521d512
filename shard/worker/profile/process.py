"""A profile in a child process, as its parent sees it: a crash or a hang there is an error here."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shard.worker.profile.report import ProfileSettings
from transport.errors import DeadlineExceeded, StageFailed, error_from_code
from transport.messages.measure import ProfileReport, read_report
from transport.process.child_process import LineChild

SILENCE_S = 90.0
"""Longer than importing torch and transformers takes on a quarter of a slow core."""


class ProfileProcess:
    """Starts at once. It ends with `close`, or with this process: its standard input is its lifeline."""

    def __init__(self, model: Path, settings: ProfileSettings, *, threads: int, silence_s: float = SILENCE_S) -> None:
        self._silence_s = silence_s
        command = ["--serve", "--model", str(model)]
        command += ["--backend", settings.backend, "--device", settings.device, "--dtype", settings.dtype]
        command += ["--threads", str(threads), "--budget", str(settings.budget_s), "--weights", settings.weights]
        if settings.memory_bytes is not None:
            command += ["--memory", str(settings.memory_bytes)]
        if settings.dummy_weights:
            command.append("--dummy-weights")
        self._child = LineChild("shard.worker.profile", command)

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
        self._child.send(f"steady {seconds}")
        match self._next_message():
            case {"steady_s": float(step_s)}:
                return step_s
            case fact:
                raise StageFailed(f"the profile said {fact!r}")

    def close(self) -> None:
        """End it, from whatever thread: who waits for it is told that it has ended."""
        self._child.close()

    def _next_message(self) -> dict[str, Any]:
        ends_at = time.monotonic() + self._silence_s
        while True:
            line = self._child.next_line(ends_at)
            if line is None:
                self.close()
                raise DeadlineExceeded(
                    f"the profile said nothing for {self._silence_s:.0f} s", hint="is the device in use, or stuck?"
                )
            if not line:
                raise self._exit_error()
            with contextlib.suppress(ValueError):  # What a library prints is not for us.
                fact = json.loads(line)
                if isinstance(fact, dict) and isinstance(error := fact.get("error"), dict):
                    raise error_from_code(str(error.get("code")), str(error.get("message")), str(error.get("hint")))
                if isinstance(fact, dict):
                    return fact

    def _exit_error(self) -> StageFailed:
        ended = self._child.ended()
        if ended is None:
            return StageFailed("the profile closed its output and goes on")
        code, last_error = ended
        if code < 0:
            hint = "the system was out of memory, if nobody killed it: lower --memory" if code == -9 else ""
            return StageFailed(f"the profile was ended by signal {-code}", hint=hint)
        words = f": {last_error}" if last_error else ""
        return StageFailed(f"the profile ended with exit code {code}{words}")
