"""Questions to workers and other hosts, and the answers. Whoever is asked may take long, but must not fall silent."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from transport.control import Peer
from transport.control_messages import ControlMessage
from transport.errors import DeadlineExceeded, PotluckError, error_from_code
from transport.measure_messages import MeasureFault
from transport.pool_messages import HostFault


class Reachable(Protocol):
    @property
    def peer(self) -> Peer: ...


Who = TypeVar("Who", bound=Reachable)
Question = TypeVar("Question", bound=msgspec.Struct)
Answer = TypeVar("Answer")
News = TypeVar("News")


@dataclass(slots=True)
class _Asked(Generic[Who, Answer, News]):
    who: Who
    heard_s: float
    news: list[News] = field(default_factory=list)
    answer: Answer | PotluckError | None = None


class Questions(Generic[Who, Question, Answer, News]):
    """The open ones. Thread-safe.

    `send` puts a message on its way; `answers` and `news` are the messages that end a question, and that only say what
    is going on; `why_gone` says why nobody will answer, once whoever is asked is not there any more.
    """

    def __init__(
        self,
        send: Callable[[Peer, ControlMessage], None],
        *,
        answers: tuple[type[Answer], ...],
        news: tuple[type[News], ...],
        why_gone: Callable[[Who], PotluckError | None],
    ) -> None:
        self._send = send
        self._answers = answers
        self._news = news
        self._why_gone = why_gone
        self._tokens = itertools.count(1)
        self._asked: dict[int, _Asked[Who, Answer, News]] = {}
        self._changed = threading.Condition()

    def ask(
        self,
        questions: Sequence[tuple[Who, Question]],
        *,
        silence_s: float,
        on_news: Callable[[Who, News], None] = lambda who, news: None,
    ) -> list[Answer | PotluckError]:
        """Ask all at once, and wait for the answers, in order; an error in place of one that did not come.

        `on_news` is called with what is said meanwhile; who says nothing for `silence_s` is given up.
        """
        now_s = time.monotonic()
        asked = {next(self._tokens): _Asked[Who, Answer, News](who, now_s) for who, _ in questions}
        with self._changed:
            self._asked.update(asked)
        try:
            for token, (who, question) in zip(asked, questions, strict=True):
                message: Any = msgspec.structs.replace(question, token=token)
                self._send(who.peer, message)
            return self._wait(list(asked.values()), silence_s, on_news)
        finally:
            with self._changed:
                for token in asked:
                    del self._asked[token]

    def hear(self, peer: Peer, message: ControlMessage) -> None:
        """Take what `peer` says; what it was not asked, or nobody waits for any more, is ignored."""
        with self._changed:
            asked = self._asked.get(getattr(message, "token", 0))
            if asked is None or asked.who.peer.identity != peer.identity:
                return
            asked.heard_s = time.monotonic()
            if isinstance(message, MeasureFault | HostFault):
                asked.answer = error_from_code(message.code, message.message, message.hint)
            elif isinstance(message, self._answers):
                asked.answer = message
            elif isinstance(message, self._news):
                asked.news.append(message)
            self._changed.notify_all()

    def _wait(
        self, asked: Sequence[_Asked[Who, Answer, News]], silence_s: float, on_news: Callable[[Who, News], None]
    ) -> list[Answer | PotluckError]:
        while True:
            with self._changed:
                for one in asked:
                    self._give_up(one, silence_s)
                said = [(one.who, news) for one in asked for news in one.news]
                for one in asked:
                    one.news.clear()
                answers = [one.answer for one in asked if one.answer is not None]
                if not said and len(answers) == len(asked):
                    return answers
                if not said:
                    self._changed.wait(0.2)
            for who, news in said:
                on_news(who, news)

    def _give_up(self, one: _Asked[Who, Answer, News], silence_s: float) -> None:
        if one.answer is not None:
            return
        why_gone = self._why_gone(one.who)
        if why_gone is not None:
            one.answer = why_gone
        elif time.monotonic() - one.heard_s > silence_s:
            one.answer = DeadlineExceeded(f"no answer within {silence_s:.0f} s", hint="its log says more")
