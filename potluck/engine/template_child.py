"""The process that renders a model's chat template, as its parent sees it: it can be killed."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import threading
import time
from typing import IO

import msgspec
import psutil

from potluck.engine.template_messages import Answer, Read, read_frame, write_frame
from transport.child_process import apart, python_command, python_environment

START_WITHIN_S = 30.0
WALL_FACTOR = 6.0
"""How many times longer than it computes something may take: the machine may have much else to do."""
_MAX_RESIDENT_BYTES = 2**29
_LOOK_EVERY_S = 0.02
_KEPT_VARIABLES = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LANG", "TZ")
_PREFIX = "POTLUCK_"


class TemplateChild:
    """The child, and the thread that reads its answers: one that waits for a pipe can't be given a deadline."""

    def __init__(self, source: str, within_s: float) -> None:
        self._read = msgspec.msgpack.encode(Read(source, within_s))
        self._within_s = within_s
        self._child: subprocess.Popen[bytes] | None = None
        self._answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._first: Answer | None = None
        self._is_first_due = self._is_working = False
        self._began_s = self._began_computed_s = 0.0
        self.start()

    @property
    def is_alive(self) -> bool:
        return self._child is not None and self._child.poll() is None

    @property
    def is_idle(self) -> bool:
        """It is there, and has no work."""
        return self.is_alive and not self._is_working

    @property
    def has_started(self) -> bool:
        """It has read the template, or it can't."""
        return not self._is_first_due

    def start(self) -> None:
        self.kill()
        environment = {
            name: value for name, value in os.environ.items() if name in _KEPT_VARIABLES or name.startswith(_PREFIX)
        }
        self._child = subprocess.Popen(
            [*python_command(), "potluck.engine.template_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A traceback may show what was rendered.
            stderr=subprocess.DEVNULL,
            env={**environment, **python_environment()},
            **apart(),
        )
        self._answers = queue.SimpleQueue()
        assert self._child.stdout is not None
        threading.Thread(
            target=_read_answers, args=(self._child.stdout, self._answers), name="template", daemon=True
        ).start()
        self._first, self._is_first_due = None, True
        self.begin(self._read)

    def read_answer(self) -> Answer | None:
        """What reading the template gave; None if it did not end in time."""
        if self._is_first_due:
            # Python itself has to start.
            self._first = self.wait(START_WITHIN_S + self._within_s, START_WITHIN_S + self._within_s * WALL_FACTOR)
            self._is_first_due = False
            if self._first is None:
                self.kill()
        return self._first

    def begin(self, frame: bytes) -> None:
        """Give it work; `wait` gets what comes of it."""
        self._is_working = True
        self._began_s, self._began_computed_s = time.monotonic(), self._used()[0]
        self._write(frame)

    def wait(self, within_s: float, wall_s: float) -> Answer | None:
        """What came of the work. None if that is not there after `within_s` of computing since it began: it goes on.
        None too if the process has ended, takes too much memory, or `wall_s` as others compute: it is gone then."""
        while True:
            try:
                answer = self._answers.get(timeout=_LOOK_EVERY_S)
            except queue.Empty:
                computed_s, resident_bytes = self._used()
                if resident_bytes > _MAX_RESIDENT_BYTES or time.monotonic() - self._began_s > wall_s:
                    break
                if computed_s - self._began_computed_s > within_s:
                    return None
                continue
            if answer is None:
                break
            self._is_working = False
            return answer
        self.kill()
        return None

    def kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            assert child.stdin is not None
            # What was still to be written has no reader.
            with contextlib.suppress(OSError):
                child.stdin.close()

    def _write(self, frame: bytes) -> None:
        child = self._child
        # If it is gone, the reader says so.
        with contextlib.suppress(OSError, ValueError):
            if child is not None and child.stdin is not None:
                write_frame(child.stdin, frame)

    def _used(self) -> tuple[float, int]:
        """Its seconds of computing so far, and the bytes that it has in memory."""
        child = self._child
        if child is None:  # The renderer is being closed.
            return 0.0, 0
        try:
            process = psutil.Process(child.pid)
            times = process.cpu_times()
            return times.user + times.system, process.memory_info().rss
        except psutil.Error:
            return 0.0, 0


def _read_answers(stream: IO[bytes], answers: queue.SimpleQueue[Answer | None]) -> None:
    decoder = msgspec.msgpack.Decoder(Answer)
    with stream:
        while (frame := read_frame(stream)) is not None:
            try:
                answers.put(decoder.decode(frame))
            except msgspec.DecodeError:
                break
    answers.put(None)
