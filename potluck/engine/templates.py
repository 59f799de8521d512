"""A model's chat template, rendered in a process of its own that can be killed."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import msgspec
import psutil

from potluck.engine.template_messages import Answer, Read, Render, read_frame, write_frame
from transport.child_process import apart, python_command, python_environment
from transport.errors import BadCheckpoint, BadRequest

RENDER_WITHIN_S = 5.0
"""Of computing, for the longest chats. A template that means no harm takes a hundredth of what it may take."""
START_WITHIN_S = 30.0
_SHORT_WITHIN_S = 1.0
_MORE_S_PER_BYTE = 0.5 / 2**20
# The machine may have much else to do.
_WALL_FACTOR = 6.0
_MAX_RESIDENT_BYTES = 2**29
# As many as chats are prepared at once.
_MAX_PROCESSES = 3
_LOOK_EVERY_S = 0.05
_KEPT_VARIABLES = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LANG", "TZ")
_PREFIX = "POTLUCK_"
_HINT = "send a shorter chat, or use a model with another chat template"


class TemplateRenderer:
    """Thread-safe. Starts its process at once, so that it is there for the first chat, and again after it was killed.

    More are started while others are busy. A chat may take the longer the more it says, at most `within_s` of
    computing.
    """

    def __init__(self, source: str, *, within_s: float = RENDER_WITHIN_S) -> None:
        self._source = source
        self._within_s = within_s
        self._places = threading.Semaphore(_MAX_PROCESSES)
        self._lock = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()
        self._is_closed = False
        self._idle: list[_Process] = []
        self._made: list[_Process] = []
        self._idle.append(self._make())
        weakref.finalize(self, _stop, self._made)

    @property
    def literals(self) -> str:
        """The text that the template itself writes. Raises BadCheckpoint."""
        with self._process() as process:
            return self._ready(process)

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """Raises BadRequest where the template refuses the messages, or takes too long or too much memory for them, and
        BadCheckpoint where it can't be read."""
        data = self._encoder.encode({**variables, "messages": messages})
        within_s = min(self._within_s, _SHORT_WITHIN_S + len(data) * _MORE_S_PER_BYTE)
        frame = self._encoder.encode(Render(msgspec.Raw(data), within_s))
        with self._process() as process:
            self._ready(process)
            answer = process.ask(frame, within_s)
            if answer is None and not self._is_closed:
                # Now, so that the next chat does not wait for it.
                process.start()
        if answer is None:
            raise BadRequest(
                f"the model's chat template computed for more than {within_s:.1f} s, or took more memory than it may",
                hint=_HINT,
                param="messages",
            )
        if answer.failure == "too large":
            raise BadRequest(
                f"the model's chat template makes too much of these messages: {answer.text}",
                hint=_HINT,
                param="messages",
            )
        if answer.failure:
            raise BadRequest(
                f"the model's chat template refuses these messages: {answer.text}",
                hint="check the roles and their order: system first, then user and assistant in turn",
                param="messages",
            )
        return answer.text

    def close(self) -> None:
        self._is_closed = True
        _stop(self._made)

    @contextlib.contextmanager
    def _process(self) -> Iterator[_Process]:
        """A process for the caller alone, which may have to be started, or to be waited for."""
        with self._places:
            with self._lock:
                process = self._idle.pop() if self._idle else self._make()
            try:
                yield process
            finally:
                with self._lock:
                    self._idle.append(process)

    def _make(self) -> _Process:
        process = _Process(self._source, self._within_s)
        self._made.append(process)
        return process

    def _ready(self, process: _Process) -> str:
        if not process.is_alive:
            process.start()
        answer = process.read_answer()
        if answer is None:
            raise BadCheckpoint(
                f"the model's chat template took longer than {self._within_s:.0f} s to read, or too much memory",
                hint="use a model with another chat template",
            )
        if answer.failure:
            raise BadCheckpoint(
                f"the model's chat template can't be read: {answer.text}", hint="use a model with another chat template"
            )
        return answer.text


class _Process:
    """The child, and the thread that reads its answers: one that waits for a pipe can't be given a deadline."""

    def __init__(self, source: str, within_s: float) -> None:
        self._read = msgspec.msgpack.encode(Read(source, within_s))
        self._within_s = within_s
        self._child: subprocess.Popen[bytes] | None = None
        self._answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._first: Answer | None = None
        self._is_first_due = False
        self.start()

    @property
    def is_alive(self) -> bool:
        return self._child is not None and self._child.poll() is None

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
        self._write(self._read)

    def read_answer(self) -> Answer | None:
        """What reading the template gave; None if it did not end in time."""
        if self._is_first_due:
            # Python itself has to start.
            within_s, wall_s = START_WITHIN_S + self._within_s, START_WITHIN_S + self._within_s * _WALL_FACTOR
            self._first, self._is_first_due = self._wait(within_s, wall_s), False
        return self._first

    def ask(self, frame: bytes, within_s: float) -> Answer | None:
        """None, and the process is gone, if there is no answer after `within_s` of computing."""
        self._write(frame)
        return self._wait(within_s, within_s * _WALL_FACTOR)

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
        assert self._child is not None and self._child.stdin is not None
        # If it is gone, the reader says so.
        with contextlib.suppress(OSError):
            write_frame(self._child.stdin, frame)

    def _wait(self, within_s: float, wall_s: float) -> Answer | None:
        """The next answer; None, and the process is gone, if that takes more than `within_s` of computing, or `wall_s`
        because others compute."""
        deadline = time.monotonic() + wall_s
        before_s, _ = self._used()
        while time.monotonic() < deadline:
            try:
                answer = self._answers.get(timeout=_LOOK_EVERY_S)
            except queue.Empty:
                computed_s, resident_bytes = self._used()
                if computed_s - before_s > within_s or resident_bytes > _MAX_RESIDENT_BYTES:
                    break
                continue
            if answer is None:
                break
            return answer
        self.kill()
        return None

    def _used(self) -> tuple[float, int]:
        """Its seconds of computing so far, and the bytes that it has in memory."""
        assert self._child is not None
        try:
            process = psutil.Process(self._child.pid)
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


def _stop(processes: list[_Process]) -> None:
    for process in processes:
        process.kill()
