"""The engine: one thread that serves rings, one after the other, and turns submitted requests into events."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from potluck.engine.input_processor import ChatTokenizer, InputProcessor
from potluck.engine.request import Request
from potluck.engine.request_manager import RequestManager
from potluck.engine.settings import EngineLimits, RingSpec, StepDeadlines
from potluck.engine.step_channel import StepChannel, StepDone
from potluck.engine.tokenizer import Prompt
from transport.errors import BadRequest, PotluckError, RingDown, error_from_code
from transport.links.link import Receiver, Sender
from transport.messages.requests import (
    EngineDown,
    EngineEvent,
    EngineReady,
    EngineState,
    Finished,
    Pong,
    RequestFailed,
    RingAttached,
    Submit,
    request_failed,
)
from transport.messages.ring import Fence, Sampling

# Longer than any wait that matters: commands wake the loop, and the ring's deadlines are its own.
_IDLE_S = 60.0
_WARM_UP = "warm-up"
_WARM_UP_PROMPT_TOKENS = 32
_WARM_UP_TOKENS = 5

log = logging.getLogger("potluck.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class RingEnds:
    """The engine's ends of a ring: a receiver that listens at `endpoint`, and `connect`, which reaches the first stage
    or raises NeighbourGone; it is asked to stop by what it is given."""

    limits: EngineLimits
    receiver: Receiver
    connect: Callable[[Callable[[], bool]], Sender]
    endpoint: str = ""


class RingSession:
    """All that is of one ring, from its attachment until it is lost or detached. One thread owns it."""

    def __init__(
        self,
        fence: Fence,
        ends: RingEnds,
        tokenizer: ChatTokenizer,
        on_event: Callable[[EngineEvent], None],
        clock: Callable[[], float],
    ) -> None:
        self.fence = fence
        self.ends = ends
        self.is_ready = False
        self.warm_up_error: PotluckError | None = None
        self.channel: StepChannel | None = None
        self.input_processor = InputProcessor(tokenizer, ends.limits)
        self.requests = RequestManager(ends.limits, on_event, clock)
        self._sender: Sender | None = None
        self._clock = clock

    def connect(self, deadlines: StepDeadlines, is_cancelled: Callable[[], bool]) -> None:
        """Raises NeighbourGone."""
        self._sender = self.ends.connect(is_cancelled)
        self.channel = StepChannel(self._sender, self.ends.receiver, self.fence, deadlines, self._clock)

    def end(self, error: RingDown) -> None:
        """End every request, and close both links."""
        if self.channel is not None:
            self.channel.abandon()
        self.requests.fail_all(error)
        if self._sender is not None:
            self._sender.close()
        self.ends.receiver.close()


@dataclass(frozen=True, slots=True)
class _AddRequest:
    request: Request


@dataclass(frozen=True, slots=True)
class _CancelRequest:
    request: str


@dataclass(frozen=True, slots=True)
class _AttachCommand:
    ring: RingSpec


@dataclass(frozen=True, slots=True)
class _WarmUpCommand:
    fence: Fence


@dataclass(frozen=True, slots=True)
class _DetachCommand:
    fence: Fence
    error: PotluckError


@dataclass(frozen=True, slots=True)
class _ClearPrefixCache:
    pass


_Command = _AddRequest | _CancelRequest | _AttachCommand | _WarmUpCommand | _DetachCommand | _ClearPrefixCache


class Engine:
    """`run` serves the ring that is attached; every other method may be called from any thread.

    Each submitted request ends in exactly one terminal event. `emit` is called from the engine's thread and, for
    requests that are refused, from the submitting one; it must neither block nor raise.
    """

    def __init__(
        self,
        *,
        model: str,
        tokenizer: ChatTokenizer,
        emit: Callable[[EngineEvent], None],
        clock: Callable[[], float],
        open_ring: Callable[[RingSpec], RingEnds] | None = None,
        deadlines: StepDeadlines | None = None,
    ) -> None:
        """`open_ring` listens for a ring's last stage, for `attach`; without it rings come by `attach_ends`."""
        self._model = model
        self._tokenizer = tokenizer
        self._emit = emit
        self._clock = clock
        self._open_ring = open_ring
        self._deadlines = deadlines or StepDeadlines()
        # Guards the four below: a request is either queued before the ring goes down, and fails with it, or refused.
        self._changed = threading.Condition()
        self._commands: deque[_Command] = deque()
        self._session: RingSession | None = None
        self._lost: EngineDown | None = None
        self._is_stopping = False

    def submit(self, submit: Submit) -> None:
        """Tokenize in the calling thread and hand over; what is wrong with the request comes back as an event."""
        try:
            if submit.request == _WARM_UP:
                raise BadRequest(f"{_WARM_UP!r} is not a request's id")
            session = self._session
            if session is None:
                raise self._refusal()
            request = session.input_processor.process(submit, self._clock())
        except PotluckError as error:
            self._emit(request_failed(submit.request, error))
        except Exception as error:  # noqa: BLE001 - it is told to who asked
            # Templates and tokenizers are the model's; whatever they do, this request ends and the others go on.
            # Its text may show the prompt, which belongs into no log.
            log.error("request %s could not be prepared: %s", submit.request, type(error).__name__)
            self._emit(request_failed(submit.request, PotluckError(f"{type(error).__name__}: {error}")))
        else:
            self._post(_AddRequest(request), session)

    def cancel(self, request: str) -> None:
        """End a request; it gets `Aborted`, unless its terminal event is already on its way."""
        if request != _WARM_UP:
            self._post(_CancelRequest(request))

    def attach(self, ring: RingSpec) -> None:
        """Listen for the ring's last stage; `RingAttached` says where, or `EngineDown` why not."""
        self._post(_AttachCommand(ring))

    def attach_ends(self, fence: Fence, ends: RingEnds) -> None:
        """The same, with ends that are there already. Before `run`, or in its thread."""
        self._lose(RingDown("another ring is attached"))
        session = RingSession(fence, ends, self._tokenizer, self._on_event, self._clock)
        with self._changed:
            self._lost, self._session = None, session

    def warm_up(self, fence: Fence) -> None:
        """All stages have loaded: reach the first one, run a short generation, emit `EngineReady`, and serve."""
        self._post(_WarmUpCommand(fence))

    def detach(self, fence: Fence, error: PotluckError) -> None:
        """Leave that ring, if it is attached: its requests end with `error`."""
        self._post(_DetachCommand(fence, error))

    def clear_prefix_cache(self) -> None:
        """Release the KV that is kept for prompts to come."""
        self._post(_ClearPrefixCache())

    def stop(self) -> None:
        """Make `run` return; requests that are not over fail."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._wake()

    def state_event(self) -> EngineReady | EngineDown | None:
        """What a client that connects now must know; None while no ring is warm and none was lost."""
        with self._changed:
            session, lost = self._session, self._lost
        if session is None:
            return lost
        return self._ready_event(session) if session.is_ready else None

    def pong(self) -> Pong:
        """Counters, a moment old."""
        session = self._session
        if session is None:
            state: EngineState = "starting" if self._lost is None else "down"
            return Pong(state=state, active_requests=0, queued_requests=0, steps_in_flight=0, sequences=0)
        return Pong(
            state="ready" if session.is_ready else "starting",
            active_requests=session.requests.num_requests,
            queued_requests=session.requests.num_queued,
            steps_in_flight=session.channel.num_in_flight if session.channel is not None else 0,
            sequences=session.requests.num_sequences,
            kv_tokens=session.requests.kv.allocated_tokens,
            cached_kv_tokens=session.requests.kv.cached_tokens,
        )

    def run(self) -> None:
        """Until `stop`. A ring that is lost ends its requests, and the next one may be attached. Raises what is our own
        fault, after its requests have ended."""
        try:
            while not self._is_stopping:
                self._process_commands()
                session = self._session
                if session is not None and session.channel is not None:
                    self._send_and_receive(session, session.channel)
                else:
                    with self._changed:
                        self._changed.wait_for(lambda: self._commands or self._is_stopping)
        except Exception as error:
            log.exception("the engine failed")
            self._lose(PotluckError(f"the engine failed: {type(error).__name__}: {error}", hint="see the log"))
            raise
        finally:
            self._is_stopping = True
            self._lose(RingDown("the engine has stopped", hint="start it again"))

    def _post(self, command: _Command, session: RingSession | None = None) -> None:
        """A request is for `session`, and refused if that is over."""
        with self._changed:
            is_refused = isinstance(command, _AddRequest) and session is not self._session
            if not is_refused:
                self._commands.append(command)
                self._changed.notify_all()
        if is_refused and isinstance(command, _AddRequest):
            self._emit(request_failed(command.request.id, self._refusal()))
        else:
            self._wake()

    def _wake(self) -> None:
        session = self._session
        if session is not None:
            session.ends.receiver.wake()

    def _refusal(self) -> PotluckError:
        lost = self._lost
        if lost is None:
            return RingDown("the ring is starting", hint="try again in a moment")
        return error_from_code(lost.code, lost.message, lost.hint)

    def _process_commands(self) -> None:
        while self._commands and not self._is_stopping:
            command, session = self._commands.popleft(), self._session
            match command:
                case _AttachCommand(ring):
                    self._attach(ring)
                case _DetachCommand(fence, error) if session is not None and fence == session.fence:
                    self._lose(error)
                case _WarmUpCommand(fence) if session is not None and fence == session.fence:
                    self._warm_up(session)
                case _AddRequest(request) if session is not None:
                    if not session.requests.add(request):
                        log.error("request id %s is in use; the second one is ignored", request.id)
                case _CancelRequest(request_id) if session is not None:
                    session.requests.cancel(request_id)
                case _ClearPrefixCache() if session is not None:
                    session.requests.clear_prefix_cache()

    def _attach(self, ring: RingSpec) -> None:
        assert self._open_ring is not None, "rings come by attach_ends"
        try:
            ends = self._open_ring(ring)
        except PotluckError as error:
            self._emit(EngineDown(error.code, error.message, error.hint, fence=ring.fence))
            return
        self.attach_ends(ring.fence, ends)
        self._emit(RingAttached(ring.fence, ends.endpoint))

    def _is_detached(self) -> bool:
        with self._changed:
            return self._is_stopping or any(isinstance(command, _DetachCommand) for command in self._commands)

    def _send_and_receive(self, session: RingSession, channel: StepChannel) -> None:
        """Send what can be sent, then wait for something to come back."""
        requests = session.requests
        try:
            _send(requests, channel)
            # While the stages work: text, events, and what follows from a stop string.
            if requests.flush_outputs() or requests.kv.ops:
                _send(requests, channel)
            if self._commands:
                return
            step = channel.receive(_IDLE_S)
            if isinstance(step, StepDone):
                requests.step_done(step, self._clock())
            elif step is not None:
                failed = step.failed
                log.error("stage %d failed at step %d: %s", failed.stage, failed.step, failed.message)
                requests.step_failed(step, error_from_code(failed.code, failed.message, failed.hint))
        except PotluckError as error:
            self._lose(error)
        if session.warm_up_error is not None:
            self._lose(session.warm_up_error)

    def _warm_up(self, session: RingSession) -> None:
        """Queue a short generation ahead of everyone: first steps are slow, and a broken ring shows at once."""
        try:
            session.connect(self._deadlines, self._is_detached)
        except PotluckError as error:
            self._lose(error)
            return
        text_ids = self._tokenizer.encode_text("Hello! ") or (0,)
        most = max(1, min(_WARM_UP_PROMPT_TOKENS, session.ends.limits.sequence_tokens - _WARM_UP_TOKENS))
        submit, prompt = (
            Submit(request=_WARM_UP, sampling=Sampling(temperature=0.0)),
            Prompt(ids=(text_ids * most)[:most]),
        )
        request = session.input_processor.build_request(submit, prompt, _WARM_UP_TOKENS, frozenset(), self._clock())
        session.requests.add(request)

    def _on_event(self, event: EngineEvent) -> None:
        """Pass a client's event on; the warm-up's are ours."""
        session = self._session
        if getattr(event, "request", None) != _WARM_UP:
            self._emit(event)
        elif isinstance(event, Finished) and session is not None:
            session.requests.clear_prefix_cache()
            session.is_ready = True
            self._emit(self._ready_event(session))
        elif isinstance(event, RequestFailed) and session is not None:
            session.warm_up_error = error_from_code(event.code, event.message, event.hint)

    def _ready_event(self, session: RingSession) -> EngineReady:
        return EngineReady(model=self._model, context_tokens=session.ends.limits.sequence_tokens, fence=session.fence)

    def _lose(self, error: PotluckError) -> None:
        """End the ring, if there is one, with every request of it; those to come are refused until there is another."""
        down = RingDown(error.message, hint=error.hint)  # whatever it was, it means this to a client
        with self._changed:
            session, self._session = self._session, None
            if session is None:
                return
            lost = self._lost = EngineDown(down.code, down.message, down.hint, fence=session.fence)
            requests = [command.request for command in self._commands if isinstance(command, _AddRequest)]
            kept = [command for command in self._commands if not isinstance(command, _AddRequest)]
            self._commands = deque(kept)
        log.log(logging.INFO if self._is_stopping else logging.ERROR, "the ring is down: %s", down.message)
        session.end(down)
        for request in requests:
            self._emit(request_failed(request.id, down))
        self._emit(lost)


def _send(requests: RequestManager, channel: StepChannel) -> None:
    while (plan := requests.plan(channel.num_in_flight)) is not None:
        requests.step_sent(plan, channel.send(plan))
