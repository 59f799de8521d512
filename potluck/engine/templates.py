"""A model's chat template, rendered in a process of its own that can be killed."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from potluck.engine.template_child import WALL_FACTOR, TemplateChild
from potluck.engine.template_messages import Answer, Render
from transport.errors import BadCheckpoint, BadRequest, Busy

RENDER_WITHIN_S = 5.0
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
    computing. One chat at a time may take more than a moment: what the template is slow with, by whoever's fault, must
    not hold up the chats that it is quick with.
    """

    def __init__(self, source: str, *, within_s: float = RENDER_WITHIN_S) -> None:
        self._source = source
        self._within_s = within_s
        self._places = threading.Semaphore(_MAX_PROCESSES)
        self._slow_place = threading.Semaphore()
        self._lock = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()
        self._is_closed = False
        self._idle: list[TemplateChild] = []
        self._made: list[TemplateChild] = []
        self._idle.append(self._make())
        weakref.finalize(self, _stop, self._made)

    @property
    def literals(self) -> str:
        """The text that the template itself writes. Raises BadCheckpoint."""
        with self._process() as process:
            return self._ready(process)

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """Raises BadRequest where the template refuses the messages, or takes too long or too much memory for them;
        Busy where it needs more than a moment while another chat does; BadCheckpoint where it can't be read."""
        data = self._encoder.encode({**variables, "messages": messages})
        more_s = len(data) * _MORE_S_PER_BYTE
        within_s = min(self._within_s, _SHORT_WITHIN_S + more_s)
        with self._process() as process:
            self._ready(process)
            process.begin(self._encoder.encode(Render(msgspec.Raw(data), within_s)))
            try:
                answer = self._answer(process, min(within_s, _QUICK_WITHIN_S + more_s), within_s)
            finally:
                if not (process.is_idle or self._is_closed):
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

    def _answer(self, process: TemplateChild, quick_s: float, within_s: float) -> Answer | None:
        """None if it takes longer than it may. Raises Busy."""
        answer = process.wait(quick_s, within_s * WALL_FACTOR)
        if answer is not None or not process.is_alive:
            return answer
        if not self._slow_place.acquire(blocking=False):
            raise Busy("the model's chat template is slow with this chat, and with another", hint="try again soon")
        try:
            return process.wait(within_s, within_s * WALL_FACTOR)
        finally:
            self._slow_place.release()

    def close(self) -> None:
        self._is_closed = True
        _stop(self._made)

    @contextlib.contextmanager
    def _process(self) -> Iterator[TemplateChild]:
        """A process for the caller alone, which may have to be started, or to be waited for."""
        with self._places:
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
        self._made.append(process)
        return process

    def _ready(self, process: TemplateChild) -> str:
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


def _stop(processes: list[TemplateChild]) -> None:
    for process in processes:
        process.kill()
