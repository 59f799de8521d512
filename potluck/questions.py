"""Questions to workers before a ring is loaded, and the answers: what a device and a link take."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from transport.control import Peer
from transport.control_messages import ControlMessage
from transport.errors import DeadlineExceeded, PotluckError, RingDown, error_from_code
from transport.measure_messages import Doing, MeasureAnswer, MeasureFault, MeasureQuestion

if TYPE_CHECKING:
    from potluck.pool import PoolWorker

Answer = MeasureAnswer | PotluckError


@dataclass(slots=True)
class _Asked:
    worker: PoolWorker
    heard_s: float
    doing: list[str] = field(default_factory=list)
    answer: Answer | None = None


class Questions:
    """The pool's open questions. `send` puts a message on its way; `is_there` says whether a worker still is."""

    def __init__(self, send: Callable[[Peer, ControlMessage], None], is_there: Callable[[PoolWorker], bool]) -> None:
        self._send = send
        self._is_there = is_there
        self._tokens = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self._changed = threading.Condition()

    def ask(
        self,
        questions: Sequence[tuple[PoolWorker, MeasureQuestion]],
        *,
        silence_s: float,
        on_doing: Callable[[PoolWorker, str], None] = lambda worker, what: None,
    ) -> list[Answer]:
        """Ask all at once, and wait for the answers, in order; an error in place of one that did not come.

        `on_doing` is called when a worker says what it does; one that says nothing for `silence_s` is given up.
        """
        now_s = time.monotonic()
        asked = {next(self._tokens): _Asked(worker, now_s) for worker, _ in questions}
        with self._changed:
            self._asked.update(asked)
        try:
            for token, (worker, question) in zip(asked, questions, strict=True):
                self._send(worker.peer, msgspec.structs.replace(question, token=token))
            return self._wait(list(asked.values()), silence_s, on_doing)
        finally:
            with self._changed:
                for token in asked:
                    del self._asked[token]

    def hear(self, message: ControlMessage) -> None:
        """Take an answer; what nobody asked for, or waits for any more, is ignored."""
        with self._changed:
            asked = self._asked.get(getattr(message, "token", 0))
            if asked is None:
                return
            asked.heard_s = time.monotonic()
            match message:
                case Doing(what=what):
                    asked.doing.append(what)
                case MeasureFault(code=code, message=text, hint=hint):
                    asked.answer = error_from_code(code, text, hint)
                case _ if isinstance(message, MeasureAnswer):
                    asked.answer = message
            self._changed.notify_all()

    def _wait(
        self, asked: Sequence[_Asked], silence_s: float, on_doing: Callable[[PoolWorker, str], None]
    ) -> list[Answer]:
        while True:
            with self._changed:
                for one in asked:
                    self._give_up(one, silence_s)
                news = [(one.worker, what) for one in asked for what in one.doing]
                for one in asked:
                    one.doing.clear()
                answers = [one.answer for one in asked if one.answer is not None]
                if not news and len(answers) == len(asked):
                    return answers
                if not news:
                    self._changed.wait(0.2)
            for worker, what in news:
                on_doing(worker, what)

    def _give_up(self, one: _Asked, silence_s: float) -> None:
        if one.answer is not None:
            return
        if not self._is_there(one.worker):
            one.answer = one.worker.fault or RingDown("its worker is gone")
        elif time.monotonic() - one.heard_s > silence_s:
            one.answer = DeadlineExceeded(f"no answer within {silence_s:.0f} s", hint="its log says more")
