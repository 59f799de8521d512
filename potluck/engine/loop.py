"""The engine: one thread that owns the ring and turns submitted requests into events."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from potluck.engine.input_processor import ChatTokenizer, InputProcessor
from potluck.engine.request import Request
from potluck.engine.request_manager import RequestManager
from potluck.engine.settings import EngineLimits, StepDeadlines
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


@dataclass(frozen=True, slots=True)
class _AddRequest:
    request: Request


@dataclass(frozen=True, slots=True)
class _CancelRequest:
    request: str


@dataclass(frozen=True, slots=True)
class _RingLost:
    error: PotluckError


@dataclass(frozen=True, slots=True)
class _ClearPrefixCache:
    pass


_Command = _AddRequest | _CancelRequest | _RingLost | _ClearPrefixCache


class Engine:
    """`run` owns the ring; every other method may be called from any thread.

    Each submitted request ends in exactly one terminal event. `emit` is called from the engine's thread and, for
    requests that are refused, from the submitting one; it must neither block nor raise.
    """

    def __init__(
        self,
        *,
        model: str,
        sender: Sender,
        receiver: Receiver,
        tokenizer: ChatTokenizer,
        limits: EngineLimits,
        fence: Fence,
        emit: Callable[[EngineEvent], None],
        clock: Callable[[], float],
        deadlines: StepDeadlines | None = None,
    ) -> None:
        self._model = model
        self._receiver = receiver
        self._tokenizer = tokenizer
        self._limits = limits
        self._emit = emit
        self._clock = clock
        self._input_processor = InputProcessor(tokenizer, limits)
        self._request_manager = RequestManager(limits, self._on_event, clock)
        self._step_channel = StepChannel(sender, receiver, fence, deadlines or StepDeadlines(), clock)
        # Guards the three below: a request is either queued before the ring goes down, and fails with it, or refused.
        self._changed = threading.Condition()
        self._commands: deque[_Command] = deque()
        self._down: RingDown | None = None
        self._is_stopping = False
        self._state: EngineState = "starting"
        self._warm_up_error: PotluckError | None = None

    def submit(self, submit: Submit) -> None:
        """Tokenize in the calling thread and hand over; what is wrong with the request comes back as an event."""
        try:
            if submit.request == _WARM_UP:
                raise BadRequest(f"{_WARM_UP!r} is not a request's id")
            request = self._input_processor.process(submit, self._clock())
        except PotluckError as error:
            self._emit(request_failed(submit.request, error))
        except Exception as error:  # noqa: BLE001 - it is told to who asked
            # Templates and tokenizers are the model's; whatever they do, this request ends and the others go on.
            # Its text may show the prompt, which belongs into no log.
            log.error("request %s could not be prepared: %s", submit.request, type(error).__name__)
            self._emit(request_failed(submit.request, PotluckError(f"{type(error).__name__}: {error}")))
        else:
            self._post(_AddRequest(request))

    def cancel(self, request: str) -> None:
        """End a request; it gets `Aborted`, unless its terminal event is already on its way."""
        if request != _WARM_UP:
            self._post(_CancelRequest(request))

    def ring_lost(self, error: PotluckError) -> None:
        """Say that the ring can't serve any more: a worker died, for example."""
        self._post(_RingLost(error))

    def clear_prefix_cache(self) -> None:
        """Release the KV that is kept for prompts to come."""
        self._post(_ClearPrefixCache())

    def stop(self) -> None:
        """Make `run` return; requests that are not over fail."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._receiver.wake()

    def state_event(self) -> EngineReady | EngineDown | None:
        """What a client that connects now must know; None while the engine starts."""
        down = self._down
        if down is not None:
            return EngineDown(down.code, down.message, down.hint)
        if self._state == "ready":
            return EngineReady(model=self._model, context_tokens=self._limits.sequence_tokens)
        return None

    def pong(self) -> Pong:
        """Counters, a moment old."""
        return Pong(
            state=self._state,
            active_requests=self._request_manager.num_requests,
            queued_requests=self._request_manager.num_queued,
            steps_in_flight=self._step_channel.num_in_flight,
            sequences=self._request_manager.num_sequences,
            kv_tokens=self._request_manager.kv.allocated_tokens,
            cached_kv_tokens=self._request_manager.kv.cached_tokens,
        )

    def run(self) -> None:
        """Warm up, emit `EngineReady`, then serve until `stop`."""
        try:
            self._warm_up()
            while not self._is_stopping and self._down is None:
                self._process_commands()
                self._send_and_receive()
            with self._changed:
                self._changed.wait_for(lambda: self._is_stopping)
        except Exception as error:
            # Our own fault, but its requests still have to end.
            log.exception("the engine failed")
            self._shut_down(PotluckError(f"the engine failed: {type(error).__name__}: {error}", hint="see the log"))
        finally:
            self._shut_down(RingDown("the engine has stopped", hint="start it again"))

    def _post(self, command: _Command) -> None:
        with self._changed:
            down = self._down
            if down is None:
                self._commands.append(command)
        if down is None:
            self._receiver.wake()
        elif isinstance(command, _AddRequest):
            self._emit(request_failed(command.request.id, down))

    def _process_commands(self) -> None:
        while self._commands and self._down is None:
            match self._commands.popleft():
                case _AddRequest(request):
                    if not self._request_manager.add(request):
                        log.error("request id %s is in use; the second one is ignored", request.id)
                case _CancelRequest(request_id):
                    self._request_manager.cancel(request_id)
                case _RingLost(error):
                    self._shut_down(error)
                case _ClearPrefixCache():
                    self._request_manager.clear_prefix_cache()

    def _send_and_receive(self) -> None:
        """Send what can be sent, then wait for something to come back."""
        if self._down is not None:
            return
        try:
            self._send()
            # While the stages work: text, events, and what follows from a stop string.
            if self._request_manager.flush_outputs() or self._request_manager.kv.ops:
                self._send()
            if self._commands:
                return
            step = self._step_channel.receive(_IDLE_S)
            if isinstance(step, StepDone):
                self._request_manager.step_done(step, self._clock())
            elif step is not None:
                failed = step.failed
                log.error("stage %d failed at step %d: %s", failed.stage, failed.step, failed.message)
                self._request_manager.step_failed(step, error_from_code(failed.code, failed.message, failed.hint))
        except PotluckError as error:
            self._shut_down(error)
        if self._warm_up_error is not None:
            self._shut_down(self._warm_up_error)

    def _send(self) -> None:
        while (plan := self._request_manager.plan(self._step_channel.num_in_flight)) is not None:
            self._request_manager.step_sent(plan, self._step_channel.send(plan))

    def _warm_up(self) -> None:
        """Queue a short generation ahead of everyone: first steps are slow, and a broken ring shows at once."""
        text_ids = self._tokenizer.encode_text("Hello! ") or (0,)
        most = max(1, min(_WARM_UP_PROMPT_TOKENS, self._limits.sequence_tokens - _WARM_UP_TOKENS))
        submit, prompt = (
            Submit(request=_WARM_UP, sampling=Sampling(temperature=0.0)),
            Prompt(ids=(text_ids * most)[:most]),
        )
        request = self._input_processor.build_request(submit, prompt, _WARM_UP_TOKENS, frozenset(), self._clock())
        self._request_manager.add(request)

    def _on_event(self, event: EngineEvent) -> None:
        """Pass a client's event on; the warm-up's are ours."""
        if getattr(event, "request", None) != _WARM_UP:
            self._emit(event)
        elif isinstance(event, Finished):
            self._request_manager.clear_prefix_cache()
            self._state = "ready"
            self._emit(EngineReady(model=self._model, context_tokens=self._limits.sequence_tokens))
        elif isinstance(event, RequestFailed):
            self._warm_up_error = error_from_code(event.code, event.message, event.hint)

    def _shut_down(self, error: PotluckError) -> None:
        """For good: end every request, and refuse those to come."""
        with self._changed:
            if self._down is not None:
                return
            down = RingDown(error.message, hint=error.hint)  # whatever it was, it means this to a client
            self._down = down
            self._state = "down"
            commands = list(self._commands)
            self._commands.clear()
        log.log(logging.INFO if self._is_stopping else logging.ERROR, "the ring is down: %s", down.message)
        self._step_channel.abandon()
        self._request_manager.fail_all(down)
        for command in commands:
            if isinstance(command, _AddRequest):
                self._emit(request_failed(command.request.id, down))
        self._emit(EngineDown(down.code, down.message, down.hint))
