"""The request manager admits, commits and finishes requests: calls in, events out, no threads, no sockets."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable

from msgspec import Struct

from potluck.engine.kv_budget import KVBudget
from potluck.engine.request import Choice, Phase, Request, TokenSequence
from potluck.engine.scheduler import (
    MAX_PROMPTS_PER_STEP,
    PrefillBudget,
    SchedulerState,
    StepPlan,
    num_admissible,
    schedule,
)
from potluck.engine.settings import EngineLimits
from potluck.engine.step_channel import StepDone, StepFailed
from potluck.engine.step_times import StepTimeModel
from transport.errors import Busy, PotluckError
from transport.messages.requests import (
    Aborted,
    Accepted,
    ChoiceFinished,
    Delta,
    EngineEvent,
    Finished,
    FinishReason,
    request_failed,
)
from transport.messages.ring import Fork, Open, SampledToken, SequenceId

_DEADLINE_TIMES_ALONE = 4.0
"""A first token is due after so many times of what the prompt takes alone: short ones pass long ones, which do not wait
for ever."""

_BATCH_EXTRA_S = 60.0
_MAX_RETRIES = 1
_FIRST_RESTARTED_ID = 1 << 40


class _PendingOutput(Struct, frozen=True):
    """A token whose text is still to be made; `reason` if it ended its choice."""

    choice: Choice
    token: SampledToken
    reason: FinishReason | None


class RequestManager:
    """Admits, commits, finishes. Each request that comes in gets exactly one terminal event, and gives back its KV.

    A turn: `plan` and `step_sent` until there is nothing to send, `flush_outputs`, and when a step came back
    `step_done`. Tokens become text and events in `flush_outputs`, while the next step is on its way.
    """

    def __init__(
        self, limits: EngineLimits, emit: Callable[[EngineEvent], None], clock: Callable[[], float] = lambda: 0.0
    ) -> None:
        self._limits = limits
        self._emit = emit
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._waiting: list[Choice] = []
        self._active: dict[SequenceId, Choice] = {}
        self._decoding: list[TokenSequence] = []
        self._prompts: list[TokenSequence] = []
        self._prompt_steps_in_flight = 0
        self._pending_outputs: deque[_PendingOutput] = deque()
        self._pending_times: deque[StepDone] = deque()
        self._prefill_budget = PrefillBudget()
        self._restarted_ids = itertools.count(_FIRST_RESTARTED_ID)
        self.kv = KVBudget(limits.kv_capacity_tokens, has_window=limits.has_window, prefix_cache=limits.prefix_cache)
        self.step_times = StepTimeModel(limits.num_stages, limits.stage_times, limits.hops_s)

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def num_queued(self) -> int:
        # A copy, which is atomic: other threads read this number, too.
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
            self._emit(
                request_failed(request.id, Busy(f"{num_queued} requests are waiting already", hint="try again soon"))
            )
            return True
        self._requests[request.id] = request
        self._emit(Accepted(request.id, request.num_prompt_tokens))
        for choice in request.choices:
            sequence = choice.sequence
            sequence.deadline_s = request.submitted_s + _DEADLINE_TIMES_ALONE * self.step_times.prompt_s(
                sequence.length
            )
            sequence.deadline_s += _BATCH_EXTRA_S if sequence.priority == "batch" else 0.0
            self._waiting.append(choice)
        self._admit()
        return True

    def cancel(self, request_id: str) -> None:
        """End a request for its client; one that is over, or unknown, stays as it is."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end_request(request, Phase.ABORTED)
            self._emit(Aborted(request_id))

    def fail(self, request: Request, error: PotluckError) -> None:
        self._end_request(request, Phase.FAILED)
        self._emit(request_failed(request.id, error))

    def fail_all(self, error: PotluckError) -> None:
        """The ring is gone: so are its KV and the ops that were to go there."""
        self._pending_outputs.clear()
        for request in list(self._requests.values()):
            self.fail(request, error)
        self.kv.reset()

    def clear_prefix_cache(self) -> None:
        """Release what is kept for prompts to come."""
        self.kv.clear()

    def plan(self, num_steps_in_flight: int) -> StepPlan | None:
        """The next step, if one can go. The caller sends it and calls `step_sent`."""
        decoding, prompts = self._decoding, self._prompts
        if not decoding and not prompts and not self.kv.ops:
            return None
        for sequence in prompts[:MAX_PROMPTS_PER_STEP]:
            if not sequence.is_opened:
                self.kv.find_prefix(sequence)
        if not decoding:
            self._prefill_budget.reset()
        state = SchedulerState(
            decoding=decoding,
            prompts=prompts,
            ops=self.kv.ops,
            steps_in_flight=num_steps_in_flight,
            prompt_steps_in_flight=self._prompt_steps_in_flight,
            prefill_budget=self._prefill_budget,
            now_s=self._clock() if prompts else 0.0,
        )
        return schedule(state, self.step_times, self._limits)

    def step_sent(self, plan: StepPlan, step: int) -> None:
        self.kv.ops_sent()
        for entry in plan.entries:
            sequence = self._active[entry.sequence].sequence
            is_new = not sequence.is_opened
            sequence.step_sent(entry, step)
            if is_new:
                self.kv.sequence_opened(sequence)
            if sequence.phase is Phase.PREFILL and not sequence.num_uncomputed:
                self._prompts.remove(sequence)
        if plan.has_prompt:
            self._prompt_steps_in_flight += 1
        if plan.refill_s:
            self._prefill_budget.refill(plan.refill_s, is_wanted=bool(self._prompts))
        if plan.share is not None:
            self._prefill_budget.consume(plan.share)

    def step_done(self, step: StepDone, now_s: float) -> None:
        """A step came back: commit its tokens. Their text follows with `flush_outputs`."""
        self._step_returned(step.plan)
        self._pending_times.append(step)
        for result in step.results:
            # A sequence that ended while its step was in flight is not active any more.
            choice = self._active.get(result.sequence)
            if choice is not None:
                self._commit(choice, result.tokens[0], now_s)

    def step_failed(self, step: StepFailed, error: PotluckError) -> None:
        """A stage could not run a step: its sequences begin again from their ids, once; then their requests end."""
        self._step_returned(step.plan)
        # A stage may have failed before the step's ops: releases are sent again.
        self.kv.step_failed(step.plan.ops)
        opened = {op.sequence for op in step.plan.ops if isinstance(op, Open | Fork)}
        concerned = opened | {entry.sequence for entry in step.plan.entries}
        for sequence in concerned:
            choice = self._active.get(sequence)
            if choice is None:
                self.kv.invalidate(sequence)
            elif choice.sequence.num_retries >= _MAX_RETRIES:
                self.fail(self._requests[choice.request_id], error)
            else:
                choice.sequence.num_retries += 1
                self._restart(choice)
        self._admit()

    def flush_outputs(self) -> bool:
        """Turn committed tokens into text and events, and record how long their steps took.

        Whether a stop string ended somebody.
        """
        while self._pending_times:
            step = self._pending_times.popleft()
            sizes = [(len(entry.token_ids), entry.start) for entry in step.plan.entries]
            self.step_times.record(sizes, step.seconds, step.round_trip_s)
        was_stopped = False
        while self._pending_outputs:
            committed = self._pending_outputs.popleft()
            choice, reason = committed.choice, committed.reason
            if choice.request_id not in self._requests:
                continue
            if reason == "stop":  # a token that ends an answer is no part of its text
                self._finish_choice(choice, reason)
                continue
            text, logprobs, is_stopped = choice.output.push(committed.token)
            if text or logprobs:
                self._emit(Delta(choice.request_id, choice.index, text, logprobs))
            if is_stopped:
                was_stopped = True
                if reason is None:
                    self._end_sequence(choice, Phase.FINISHED)
                self._finish_choice(choice, "stop")
            elif reason is not None:
                self._finish_choice(choice, reason)
        if was_stopped:
            self._admit()
        return was_stopped

    def _step_returned(self, plan: StepPlan) -> None:
        for entry in plan.entries:
            choice = self._active.get(entry.sequence)
            if choice is not None:
                choice.sequence.step_returned()
        if plan.has_prompt:
            self._prompt_steps_in_flight -= 1

    def _commit(self, choice: Choice, token: SampledToken, now_s: float) -> None:
        request, sequence = self._requests[choice.request_id], choice.sequence
        was_prompt = sequence.phase is Phase.PREFILL
        sequence.commit(token.token_id)
        request.last_token_s = now_s
        if request.first_token_s is None:
            request.first_token_s = now_s
        if was_prompt:
            self._decoding.append(sequence)
        reason: FinishReason | None = None
        if token.token_id in choice.stop_token_ids:
            reason = "stop"
        elif len(sequence.generated) >= sequence.max_tokens:
            reason = "length"
        self._pending_outputs.append(_PendingOutput(choice, token, reason))
        if reason is not None:
            self._end_sequence(choice, Phase.FINISHED)
            self._admit()
        elif sequence.length >= sequence.allocated_tokens and sequence.allocated_tokens < sequence.max_total_tokens:
            self._allocate_more(choice)

    def _allocate_more(self, choice: Choice) -> None:
        """Memory for the next tokens: of what is kept, then of those due last; at worst this one waits."""
        sequence = choice.sequence
        while not self.kv.allocate(sequence):
            victim = max(self._active.values(), key=lambda active: (active.sequence.deadline_s, active.sequence.id))
            self._restart(victim)
            if victim is choice:
                return

    def _finish_choice(self, choice: Choice, reason: FinishReason) -> None:
        """Report the end of a choice whose sequence is over."""
        request = self._requests[choice.request_id]
        text, logprobs = choice.output.finish()
        if text or logprobs:
            self._emit(Delta(choice.request_id, choice.index, text, logprobs))
        choice.is_reported = True
        self._emit(ChoiceFinished(request.id, choice.index, reason, len(choice.sequence.generated)))
        if all(each.is_reported for each in request.choices):
            del self._requests[request.id]
            self._emit(
                Finished(
                    request=request.id,
                    prompt_tokens=request.num_prompt_tokens,
                    completion_tokens=request.num_completion_tokens,
                    ttft_s=request.ttft_s,
                    decode_s=request.decode_s,
                    cached_tokens=request.choices[0].num_cached,
                )
            )

    def _end_request(self, request: Request, phase: Phase) -> None:
        """Take a request out, with whatever it holds. The caller emits its terminal event."""
        del self._requests[request.id]
        self._waiting = [choice for choice in self._waiting if choice.request_id != request.id]
        for choice in request.choices:
            if not choice.sequence.is_over:
                self._end_sequence(choice, phase)
        self._admit()

    def _end_sequence(self, choice: Choice, phase: Phase) -> None:
        """A sequence is over. Nothing is admitted here: the caller may have more to end."""
        sequence = choice.sequence
        if sequence.phase is not Phase.WAITING:
            self._remove_active(sequence)
            self.kv.free(sequence, keep_prefix=phase is not Phase.FAILED)
            choice.num_cached = min(sequence.num_cached, len(sequence.prompt_ids))
        else:
            self._waiting = [other for other in self._waiting if other is not choice]
        sequence.move_to(phase)

    def _remove_active(self, sequence: TokenSequence) -> None:
        del self._active[sequence.id]
        if sequence.phase is Phase.DECODE:
            self._decoding.remove(sequence)
        elif sequence.num_uncomputed:
            self._prompts.remove(sequence)

    def _restart(self, choice: Choice) -> None:
        """Free a sequence's KV and queue it again: all its ids will be computed again, under another id."""
        sequence = choice.sequence
        self._remove_active(sequence)
        self.kv.free(sequence, keep_prefix=False)
        sequence.restart(SequenceId(next(self._restarted_ids)))
        self._waiting.append(choice)

    def _admit(self) -> None:
        if not self._waiting:
            return
        self._waiting.sort(key=lambda choice: choice.sequence.deadline_s)
        count = num_admissible(
            (choice.sequence for choice in self._waiting),
            free_tokens=self.kv.available_tokens,
            num_active=len(self._active),
            limits=self._limits,
        )
        for _ in range(count):
            choice = self._waiting[0]
            sequence = choice.sequence
            if not self.kv.allocate(sequence):
                break  # what it would take over could not be counted twice
            del self._waiting[0]
            sequence.move_to(Phase.PREFILL)
            self._active[sequence.id] = choice
            self._prompts.append(sequence)
        self._prompts.sort(key=lambda sequence: sequence.deadline_s)
