"""The chat template renderer renders in processes of its own, which can be killed."""

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

from potluck.engine.template_process import LoadTemplate, RenderTemplate, TemplateReply, read_frame, write_frame
from transport.errors import BadCheckpoint, BadRequest, Busy
from transport.process.child_process import ChildProcess

START_TIMEOUT_S = 30.0
WALL_FACTOR = 6.0
"""How many times longer than it computes something may take: the machine may have much else to do."""
_MAX_RESIDENT_BYTES = 2**29
_POLL_S = 0.02
_KEPT_VARIABLES = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LANG", "TZ")
_PREFIX = "POTLUCK_"


class TemplateChild:
    """The child, and the thread that reads its answers: one that waits for a pipe can't be given a deadline."""

    def __init__(self, source: str, within_s: float) -> None:
        self._read = msgspec.msgpack.encode(LoadTemplate(source, within_s))
        self._within_s = within_s
        self._child: ChildProcess | None = None
        self._replies: queue.SimpleQueue[TemplateReply | None] = queue.SimpleQueue()
        self._first: TemplateReply | None = None
        self._is_first_due = self._is_working = False
        self._began_s = self._began_computed_s = 0.0
        self.start()

    @property
    def is_alive(self) -> bool:
        return self._child is not None and self._child.exit_code() is None

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
        # A traceback may show what was rendered.
        self._child = ChildProcess(
            "potluck.engine.template_process", errors=subprocess.DEVNULL, environment=environment
        )
        self._replies = queue.SimpleQueue()
        threading.Thread(
            target=_read_replies, args=(self._child.stdout, self._replies), name="template", daemon=True
        ).start()
        self._first, self._is_first_due = None, True
        self.begin(self._read)

    def load_reply(self) -> TemplateReply | None:
        """What reading the template gave; None if it did not end in time."""
        if self._is_first_due:
            # Python itself has to start.
            self._first = self.wait(START_TIMEOUT_S + self._within_s, START_TIMEOUT_S + self._within_s * WALL_FACTOR)
            self._is_first_due = False
            if self._first is None:
                self.kill()
        return self._first

    def begin(self, frame: bytes) -> None:
        """Give it work; `wait` gets what comes of it."""
        self._is_working = True
        self._began_s, self._began_computed_s = time.monotonic(), self._cpu_seconds_and_memory()[0]
        self._write(frame)

    def wait(self, within_s: float, wall_s: float) -> TemplateReply | None:
        """What came of the work. None if that is not there after `within_s` of computing since it began: it goes on.
        None too if the process has ended, takes too much memory, or `wall_s` as others compute: it is gone then."""
        while True:
            try:
                answer = self._replies.get(timeout=_POLL_S)
            except queue.Empty:
                computed_s, resident_bytes = self._cpu_seconds_and_memory()
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
            child.close()

    def _write(self, frame: bytes) -> None:
        child = self._child
        # If it is gone, the reader says so.
        with contextlib.suppress(OSError, ValueError):
            if child is not None:
                write_frame(child.stdin, frame)

    def _cpu_seconds_and_memory(self) -> tuple[float, int]:
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


def _read_replies(stream: IO[bytes], answers: queue.SimpleQueue[TemplateReply | None]) -> None:
    decoder = msgspec.msgpack.Decoder(TemplateReply)
    with stream:
        while (frame := read_frame(stream)) is not None:
            try:
                answers.put(decoder.decode(frame))
            except msgspec.DecodeError:
                break
    answers.put(None)


RENDER_TIMEOUT_S = 5.0
"""Of computing, for the longest chats. A template that means no harm takes a hundredth of what it may take."""
_SHORT_WITHIN_S = 1.0
_MORE_S_PER_BYTE = 0.5 / 2**20
# What is not done then goes on only if no other one does.
_QUICK_WITHIN_S = 0.1
# As many as chats are prepared at once.
_MAX_PROCESSES = 3
_HINT = "send a shorter chat, or use a model with another chat template"


class TemplateRenderer:
    """Thread-safe. Starts its process at once, so that it is there for the first chat, and again after it was killed.

    More are started while others are busy. A chat may take the longer the more it says, at most `within_s` of
    computing. One chat at a time may take more than a moment: what the template is slow with must not hold up the chats
    that it is quick with.
    """

    def __init__(self, source: str, *, within_s: float = RENDER_TIMEOUT_S) -> None:
        self._source = source
        self._within_s = within_s
        self._slots = threading.Semaphore(_MAX_PROCESSES)
        self._slow_slot = threading.Semaphore()
        self._lock = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()
        self._is_closed = False
        self._idle: list[TemplateChild] = []
        self._all_children: list[TemplateChild] = []
        self._idle.append(self._make())
        weakref.finalize(self, _kill_all, self._all_children)

    @property
    def literals(self) -> str:
        """The text that the template itself writes. Raises BadCheckpoint."""
        with self._process() as process:
            return self._loaded_literals(process)

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """Raises BadRequest where the template refuses the messages, or takes too long or too much memory for them;
        Busy where it needs more than a moment while another chat does; BadCheckpoint where it can't be read."""
        data = self._encoder.encode({**variables, "messages": messages})
        more_s = len(data) * _MORE_S_PER_BYTE
        within_s = min(self._within_s, _SHORT_WITHIN_S + more_s)
        with self._process() as process:
            self._loaded_literals(process)
            process.begin(self._encoder.encode(RenderTemplate(msgspec.Raw(data), within_s)))
            try:
                answer = self._wait_for_reply(process, min(within_s, _QUICK_WITHIN_S + more_s), within_s)
            finally:
                if not (process.is_idle or self._is_closed):
                    # Now, so that the next chat does not wait for it.
                    process.start()
        if answer is None:
            why, hint = f"computed for more than {within_s:.1f} s, or took more memory than it may", _HINT
        elif answer.failure == "too large":
            why, hint = f"makes too much of these messages: {answer.text}", _HINT
        elif answer.failure:
            why = f"refuses these messages: {answer.text}"
            hint = "check the roles and their order: system first, then user and assistant in turn"
        else:
            return answer.text
        raise BadRequest(f"the model's chat template {why}", hint=hint, param="messages")

    def _wait_for_reply(self, process: TemplateChild, quick_s: float, within_s: float) -> TemplateReply | None:
        """None if it takes longer than it may. Raises Busy."""
        answer = process.wait(quick_s, within_s * WALL_FACTOR)
        if answer is not None or not process.is_alive:
            return answer
        if not self._slow_slot.acquire(blocking=False):
            raise Busy("the model's chat template is slow with this chat, and with another", hint="try again soon")
        try:
            return process.wait(within_s, within_s * WALL_FACTOR)
        finally:
            self._slow_slot.release()

    def close(self) -> None:
        self._is_closed = True
        _kill_all(self._all_children)

    @contextlib.contextmanager
    def _process(self) -> Iterator[TemplateChild]:
        """A process for the caller alone, which may have to be started, or to be waited for."""
        with self._slots:
            with self._lock:
                process = self._idle.pop() if self._idle else self._make()
            try:
                yield process
            finally:
                with self._lock:
                    # One that has just been started is taken last.
                    self._idle.insert(len(self._idle) if process.has_started else 0, process)

    def _make(self) -> TemplateChild:
        process = TemplateChild(self._source, self._within_s)
        self._all_children.append(process)
        return process

    def _loaded_literals(self, process: TemplateChild) -> str:
        if not process.is_alive:
            process.start()
        answer = process.load_reply()
        if answer is not None and not answer.failure:
            return answer.text
        why = f"took longer than {self._within_s:.0f} s to read, or too much memory"
        if answer is not None:
            why = f"can't be read: {answer.text}"
        raise BadCheckpoint(f"the model's chat template {why}", hint="use a model with another chat template")


def _kill_all(processes: list[TemplateChild]) -> None:
    for process in processes:
        process.kill()
