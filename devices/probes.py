"""Runs the probes of one host at the same moment, each in its own process, and collects what they say."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Sequence

from devices.device import DeviceRequest
from devices.measure import Measured
from devices.probe import READY
from transport.child_process import apart, python_command, python_environment

READY_S = 60.0
"""For a probe to load its library and touch its memory: importing torch from a cold disk takes most of it."""

RESULT_S = 15.0
"""For the measurement itself, about a second on any device that is worth its place."""


def run_probes(requests: Sequence[DeviceRequest], ready_s: float = READY_S) -> list[Measured | str]:
    """For each request what was measured, or in words why it could not be. No process outlives this call."""
    ready_by = time.monotonic() + ready_s
    probes = [_Probe(request) for request in requests]
    try:
        # All measure together: none starts before the last is ready, or has failed.
        ready = [probe.wait_until_ready(ready_by) for probe in probes]
        for probe, is_ready in zip(probes, ready, strict=True):
            if is_ready:
                probe.start()
        result_by = time.monotonic() + RESULT_S
        return [
            probe.result(result_by) if is_ready else probe.why_not(ready_s)
            for probe, is_ready in zip(probes, ready, strict=True)
        ]
    finally:
        for probe in probes:
            probe.close()


class _Probe:
    def __init__(self, request: DeviceRequest) -> None:
        command = [*python_command(), "devices.probe", "--json", "--wait"]
        command += ["--backend", request.backend, "--device", request.kind, "--threads", str(request.threads)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env=os.environ | python_environment(),
            **apart(),
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._errors: list[str] = []
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_lines, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def wait_until_ready(self, ends_at: float) -> bool:
        return self._next_line(ends_at) == READY

    def start(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # It died meanwhile: `result` says so.
            self._process.stdin.write("go\n")
            self._process.stdin.flush()

    def result(self, ends_at: float) -> Measured | str:
        line = self._next_line(ends_at)
        if not line:
            return self.why_not(RESULT_S)
        try:
            return Measured(**json.loads(line))
        except (ValueError, TypeError):
            return f"its probe said {line!r}"

    def why_not(self, waited_s: float) -> str:
        """Why there is no answer: the probe's own words, how it ended, or that it did not."""
        try:
            # It may have closed its output a moment before it ends.
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return f"its probe gave no answer within {waited_s:.0f} s"
        self._readers[1].join(1.0)
        if code < 0:
            return f"its probe was ended by signal {-code}" + (" (out of memory?)" if code == -9 else "")
        return self._errors[-1] if self._errors else f"its probe ended with exit code {code}"

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join(1.0)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _next_line(self, ends_at: float) -> str:
        """The next line of output; "" at its end or at the deadline."""
        try:
            return self._lines.get(timeout=max(0.0, ends_at - time.monotonic()))
        except queue.Empty:
            return ""

    def _read_lines(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.strip())
        # Twice, for whoever waits for "ready" and then for a result.
        self._lines.put("")
        self._lines.put("")

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors.extend(line.strip() for line in self._process.stderr if line.strip())
