"""The step channel sends numbered steps into the ring and takes their results, each with a deadline."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from msgspec import Struct

from potluck.engine.scheduler import StepPlan
from potluck.engine.settings import StepDeadlines
from transport.errors import BadMessage, DeadlineExceeded
from transport.links.link import Receiver, Sender
from transport.messages.ring import EntryResult, Failed, Fence, Sampled, Tokens
from transport.process.polling import SuspendDetector

_RECENT_STEPS = 64
_CHECK_INTERVAL_S = 1.0


class StepDone(Struct, frozen=True):
    """`seconds` is what each stage computed; `round_trip_s` is None where the step was not alone in the ring."""

    plan: StepPlan
    results: tuple[EntryResult, ...]
    seconds: tuple[float, ...] = ()
    round_trip_s: float | None = None


class StepFailed(Struct, frozen=True):
    """A stage could not run the step; later steps go on."""

    plan: StepPlan
    failed: Failed


class _InFlight(Struct):
    """`was_alone`: neither before nor behind it was another step in the ring."""

    step: int
    plan: StepPlan
    sent_s: float
    was_alone: bool


class ProgressDeadline:
    """How long the ring may take, from how long it took: the slowest of the last steps, per token."""

    def __init__(self, deadlines: StepDeadlines) -> None:
        self._deadlines = deadlines
        self._seconds_per_token: deque[float] = deque(maxlen=_RECENT_STEPS)

    def record(self, seconds: float, num_tokens: int) -> None:
        if num_tokens:
            self._seconds_per_token.append(seconds / num_tokens)

    def timeout_s(self, num_tokens: int) -> float:
        """Seconds until the next step must come back, with `num_tokens` in flight."""
        limits = self._deadlines
        if not self._seconds_per_token:
            return limits.first_s
        return min(limits.max_s, max(limits.min_s, limits.factor * max(self._seconds_per_token) * num_tokens))


class StepChannel:
    """One thread owns it. Steps come back in the order they were sent; anything else is a fault of the ring."""

    def __init__(
        self, sender: Sender, receiver: Receiver, fence: Fence, deadlines: StepDeadlines, clock: Callable[[], float]
    ) -> None:
        self._sender = sender
        self._receiver = receiver
        self._fence = fence
        self._clock = clock
        self._progress = ProgressDeadline(deadlines)
        self._in_flight: deque[_InFlight] = deque()
        self._next_step = 0
        self._progress_s = 0.0
        self._suspend_detector = SuspendDetector(clock)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def send(self, plan: StepPlan) -> int:
        """Number the step and send it. Raises RingDown."""
        now_s = self._clock()
        if self._in_flight:
            self._in_flight[-1].was_alone = False
        else:
            self._progress_s = now_s
        step = self._next_step
        self._next_step += 1
        self._in_flight.append(_InFlight(step, plan, now_s, not self._in_flight))
        self._sender.send(Tokens(self._fence, step, plan.ops, plan.entries))
        return step

    def receive(self, idle_s: float) -> StepDone | StepFailed | None:
        """The next step that came back; None after `idle_s` or a wake.

        Raises RingDown if a neighbour is gone, BadMessage if an answer does not fit its question, DeadlineExceeded if
        the ring has made no progress for too long.
        """
        self._extend_deadline(0.0)
        remaining_s = self._remaining_s()
        wait_s = idle_s if remaining_s is None else max(0.0, min(idle_s, remaining_s, _CHECK_INTERVAL_S))
        received = self._receiver.receive(wait_s)
        self._extend_deadline(wait_s)
        if received is None:
            remaining_s = self._remaining_s()
            if remaining_s is not None and remaining_s <= 0:
                raise DeadlineExceeded(
                    f"step {self._in_flight[0].step} has not come back {self._clock() - self._progress_s:.0f} s after "
                    "the last sign of progress",
                    hint="a device may be asleep, swapping or overloaded: look at it, then start again",
                )
            return None
        # No patterns and few calls: caches are cold when a step comes back, and the next one waits for this.
        message = received.message
        if isinstance(message, Sampled):
            taken = self._pop(message.step) if message.fence == self._fence else None
            if taken is None:
                return None
            _check_results(taken.plan, message)
            round_trip_s = self._progress_s - taken.sent_s if taken.was_alone else None
            return StepDone(taken.plan, message.results, message.seconds, round_trip_s)
        if isinstance(message, Failed) and message.fence == self._fence:
            taken = self._pop(message.step)
            return None if taken is None else StepFailed(taken.plan, message)
        return None  # another life of the ring, or a greeting

    def _extend_deadline(self, expected_s: float) -> None:
        """While this process was paused the stages probably were too: that time is not theirs."""
        self._progress_s = min(self._clock(), self._progress_s + self._suspend_detector.suspended_s(expected_s))

    def abandon(self) -> None:
        """Expect nothing any more."""
        self._in_flight.clear()

    def _remaining_s(self) -> float | None:
        """Until the deadline; None if nothing is in flight."""
        if not self._in_flight:
            return None
        num_tokens = sum(each.plan.num_tokens for each in self._in_flight)
        return self._progress_s + self._progress.timeout_s(num_tokens) - self._clock()

    def _pop(self, step: int) -> _InFlight | None:
        """The step that came back; None for a duplicate."""
        if not self._in_flight or step < self._in_flight[0].step:
            return None
        taken = self._in_flight[0]
        if step != taken.step:
            raise BadMessage(f"step {step} came back before step {taken.step}")
        self._in_flight.popleft()
        now_s = self._clock()
        self._progress.record(now_s - self._progress_s, taken.plan.num_tokens)
        self._progress_s = now_s
        return taken


def _check_results(plan: StepPlan, sampled: Sampled) -> None:
    """Results come in the order of the entries that asked for them."""
    results, at = sampled.results, 0
    for entry in plan.entries:
        if entry.num_logits:
            result = results[at] if at < len(results) else None
            at += 1
            if (
                result is None
                or result.sequence != entry.sequence
                or result.position != entry.start + len(entry.token_ids) - entry.num_logits + 1
                or len(result.tokens) != entry.num_logits
            ):
                raise BadMessage(f"step {sampled.step} came back with other results than it asked for: {results}")
    if at != len(results):
        raise BadMessage(f"step {sampled.step} came back with more results than it asked for: {results}")
