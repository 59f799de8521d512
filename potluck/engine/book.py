"""Everything the engine knows about its requests. No threads, no sockets: calls in, events out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from potluck.engine.limits import EngineLimits
from potluck.engine.request import Choice, Request
from potluck.engine.ring import StepDone, StepFailed
from potluck.engine.scheduler import StepPlan, num_admissible, schedule
from potluck.engine.sequences import Phase
from transport.errors import Busy, PotluckError
from transport.messages import Release, SampledToken, SequenceId
from transport.requests import (
    Aborted,
    Accepted,
    ChoiceFinished,
    Delta,
    EngineEvent,
    Finished,
    FinishReason,
    RequestFailed,
)


def failure(request: str, error: PotluckError) -> RequestFailed:
    """The terminal event that tells a client of `error`."""
    return RequestFailed(
        request=request,
        code=error.code,
        message=error.message,
        hint=error.hint,
        param=getattr(error, "param", None),
    )


class RequestBook:
    """Admits, commits, finishes. Each request that comes in gets exactly one terminal event, and gives back its KV."""

    def __init__(self, limits: EngineLimits, emit: Callable[[EngineEvent], None]) -> None:
        self._limits = limits
        self._emit = emit
        self._requests: dict[str, Request] = {}
        self._waiting: deque[tuple[Request, Choice]] = deque()
        self._active: dict[SequenceId, tuple[Request, Choice]] = {}
        self._releases: list[Release] = []
        self._last_was_prefill = True
        self.free_tokens = limits.kv_capacity_tokens

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def num_queued(self) -> int:
        # A copy, which is atomic: other threads ask for this number, too.
        return sum(request.is_queued for request in list(self._requests.values()))

    @property
    def num_sequences(self) -> int:
        """Sequences that hold KV, or may."""
        return len(self._active)

    def add(self, request: Request) -> bool:
        """Queue a request, and start it if there is room. False, and no event, if its id is in use."""
        if request.id in self._requests:
            return False
        num_queued = self.num_queued
        if num_queued >= self._limits.max_queued_requests:
            self._emit(failure(request.id, Busy(f"{num_queued} requests are waiting already", hint="try again soon")))
            return True
        self._requests[request.id] = request
        self._emit(Accepted(request.id, request.num_prompt_tokens))
        self._waiting.extend((request, choice) for choice in request.choices)
        self._admit()
        return True

    def cancel(self, request_id: str) -> None:
        """End a request for its client; one that is over, or unknown, stays as it is."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request, Phase.ABORTED)
            self._emit(Aborted(request_id))

    def fail(self, request: Request, error: PotluckError) -> None:
        self._end(request, Phase.FAILED)
        self._emit(failure(request.id, error))

    def fail_all(self, error: PotluckError) -> None:
        """The ring is gone: so are its KV and the releases it was owed."""
        for request in list(self._requests.values()):
            self.fail(request, error)
        self._releases.clear()

    def plan(self, num_steps_in_flight: int) -> StepPlan | None:
        """The next step, if one can go. The caller sends it and says so with `sent`."""
        return schedule(
            [choice.sequence for _, choice in self._active.values()],
            self._releases,
            num_steps_in_flight=num_steps_in_flight,
            last_was_prefill=self._last_was_prefill,
            limits=self._limits,
        )

    def sent(self, plan: StepPlan, step: int) -> None:
        self._releases.clear()
        for entry in plan.entries:
            self._active[entry.sequence][1].sequence.sent(entry, step)
        if plan.entries:
            self._last_was_prefill = plan.is_prefill

    def done(self, step: StepDone, now_s: float) -> None:
        """A step came back: commit its tokens."""
        self._returned(step.plan)
        for result in step.results:
            # A sequence that ended while its step was in flight is not active any more.
            held = self._active.get(result.sequence)
            if held is not None:
                request, choice = held
                self._commit(request, choice, result.tokens[0], now_s)

    def step_failed(self, step: StepFailed, error: PotluckError) -> None:
        """A stage could not run a step: the requests in it end."""
        self._returned(step.plan)
        # The stage may have failed before it released; releasing twice does no harm.
        self._releases.extend(op for op in step.plan.ops if isinstance(op, Release))
        for entry in step.plan.entries:
            held = self._active.get(entry.sequence)
            if held is not None:
                self.fail(held[0], error)

    def _returned(self, plan: StepPlan) -> None:
        for entry in plan.entries:
            held = self._active.get(entry.sequence)
            if held is not None:
                held[1].sequence.returned()

    def _commit(self, request: Request, choice: Choice, token: SampledToken, now_s: float) -> None:
        sequence = choice.sequence
        sequence.commit(token.token_id)
        request.last_token_s = now_s
        if request.first_token_s is None:
            request.first_token_s = now_s
        if token.token_id in choice.ends:
            self._finish(request, choice, "stop")
            return
        text, logprobs, is_stopped = choice.output.push(token)
        if text or logprobs:
            self._emit(Delta(request.id, choice.index, text, logprobs))
        if is_stopped:
            self._finish(request, choice, "stop")
        elif len(sequence.generated) >= sequence.max_tokens:
            self._finish(request, choice, "length")

    def _finish(self, request: Request, choice: Choice, reason: FinishReason) -> None:
        text, logprobs = choice.output.finish()
        if text or logprobs:
            self._emit(Delta(request.id, choice.index, text, logprobs))
        self._leave(choice, Phase.FINISHED)
        self._emit(ChoiceFinished(request.id, choice.index, reason, len(choice.sequence.generated)))
        if request.is_over:
            del self._requests[request.id]
            self._emit(
                Finished(
                    request=request.id,
                    prompt_tokens=request.num_prompt_tokens,
                    completion_tokens=request.num_completion_tokens,
                    ttft_s=request.ttft_s,
                    decode_s=request.decode_s,
                )
            )
        self._admit()

    def _end(self, request: Request, phase: Phase) -> None:
        """Take a request out, with whatever it holds. The caller emits its terminal event."""
        del self._requests[request.id]
        if request.is_queued:
            self._waiting = deque(item for item in self._waiting if item[0] is not request)
        for choice in request.choices:
            if not choice.sequence.is_over:
                self._leave(choice, phase)
        self._admit()

    def _leave(self, choice: Choice, phase: Phase) -> None:
        sequence = choice.sequence
        if sequence.phase is not Phase.WAITING:
            del self._active[sequence.id]
            # The release is in the ring before anything that could use the memory, so it counts as free at once.
            self.free_tokens += sequence.reserved_tokens
            if sequence.is_opened:
                self._releases.append(Release(sequence.id))
        sequence.to(phase)

    def _admit(self) -> None:
        count = num_admissible(
            (choice.sequence for _, choice in self._waiting),
            free_tokens=self.free_tokens,
            num_active=len(self._active),
            limits=self._limits,
        )
        for _ in range(count):
            request, choice = self._waiting.popleft()
            choice.sequence.to(Phase.PREFILL)
            self.free_tokens -= choice.sequence.reserved_tokens
            self._active[choice.sequence.id] = (request, choice)
