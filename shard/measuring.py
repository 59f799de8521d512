"""What a worker measures for its head before a ring is loaded: its device (in a child process) and links from here."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import zmq

from shard.model_fetch import ModelFetch
from shard.profile.process import ProfileProcess
from shard.profile.settings import ProfileSettings
from transport.control_messages import ControlMessage, Register
from transport.edges import Edges
from transport.errors import PotluckError, StageFailed
from transport.link_probe import LinkEnd
from transport.measure_messages import (
    Doing,
    LinkListen,
    LinkListening,
    LinkProbe,
    MeasureAnswer,
    MeasureFault,
    MeasureQuestion,
    Profile,
    Profiled,
    Steady,
    SteadyTime,
)

log = logging.getLogger(__name__)


class Measuring:
    """Answers questions in order, in a thread of its own; `ask` and `end` never block. `models` gets models that lie
    on other hosts."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        register: Register,
        *,
        edges: Edges,
        models: ModelFetch | None = None,
        send: Callable[[ControlMessage], None],
    ) -> None:
        self._context = context
        self._register = register
        self._edges = edges
        self._models = models
        self._send = send
        self._questions: queue.SimpleQueue[MeasureQuestion] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._profile: ProfileProcess | None = None
        self._link: LinkEnd | None = None

    def ask(self, question: MeasureQuestion) -> None:
        self._questions.put(question)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="measuring", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Free what a profile holds, also one that is still measuring: it is answered by a fault."""
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.close()

    def _run(self) -> None:
        while True:
            question = self._questions.get()
            try:
                answer = self._answer(question)
            except PotluckError as error:
                log.error("it could not be measured: %s", error)
                answer = MeasureFault(question.token, error.code, error.message, error.hint)
            except Exception as error:  # The root of the thread: the head must hear of it.
                log.exception("measuring failed")
                answer = MeasureFault(question.token, StageFailed.code, f"{type(error).__name__}: {error}")
            self._send(answer)

    def _answer(self, question: MeasureQuestion) -> MeasureAnswer:
        match question:
            case Profile():
                return self._profiled(question)
            case Steady(token=token, seconds=seconds):
                if self._profile is None:
                    raise StageFailed("nothing is profiled now")
                return SteadyTime(token, self._profile.steady(seconds))
            case LinkListen(token=token, listen=listen, shape=shape, upstream=upstream):
                self._close_link()
                endpoint = self._edges.listen_at(listen, f"probe-{token}")
                guard = self._edges.guard(endpoint, upstream)
                self._link = LinkEnd(self._context, endpoint, shape, guard=guard)
                return LinkListening(token, self._link.endpoint)
            case LinkProbe(token=token, next=next, leads=leads, key=key):
                if self._link is None:
                    raise StageFailed("no link is measured now")
                try:
                    probed = self._link.run(next, leads=leads, prepare=self._edges.towards(next, key))
                    return msgspec.structs.replace(probed, token=token)
                finally:
                    self._close_link()

    def _profiled(self, question: Profile) -> Profiled:
        self.end()
        settings = ProfileSettings(
            backend=self._register.backend,
            device=self._register.kind,
            dtype=question.dtype,
            budget_s=question.budget_s,
            memory_bytes=question.memory_bytes,
            weights=question.weights,
        )
        model = Path(question.model_path)
        if question.shared is not None and self._models is not None:
            # Times do not depend on what the numbers are: the weights may stay where they lie.
            model = self._models.skeleton(question.shared)
            settings = replace(settings, unread=True)
        profile = ProfileProcess(model, settings, threads=self._register.threads)
        self._profile = profile
        try:
            report = profile.report(lambda what: self._send(Doing(question.token, what)))
        except PotluckError:
            self.end()
            raise
        return Profiled(question.token, msgspec.json.encode(report))

    def _close_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
