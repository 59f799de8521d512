"""The prefill budget, a token bucket, bounds how much time prompts take from sequences that decode."""

from __future__ import annotations

from dataclasses import dataclass

from potluck.engine.step_times import MicroBatches, StepTimeModel

SLOWDOWN = 1.5
"""While prompts are worked on, the others' tokens come at most so many times more slowly, on average and in 95 of 100
gaps."""

LATE_SLOWDOWN = 2.0
"""The same, once a prompt waits for longer than it should."""

_MIN_BURST_S = 0.2
MAX_BURST_S = 0.3
_TOKENS_PER_BURST = 40
"""A pause that comes once in so many tokens is not among 95 of 100 gaps."""

_CHUNKS_PER_BURST = 4
_MAX_INEFFICIENCY = 1.25
_TYPICAL_CHUNK = 64
_MIN_CHUNK = 8


@dataclass(frozen=True, slots=True)
class PrefillShare:
    """The next chunk's tokens and what it costs the others in seconds, as the first of a slice or behind another;
    `burst_s`: so much is saved up before it goes, 0 for a chunk between decode steps."""

    tokens: int
    cost_s: float
    first_cost_s: float
    burst_s: float


class PrefillBudget:
    """Time that prompts may take from the others: earned by their decode steps, spent by chunks.

    Small chunks between decode steps are smooth, but where a small chunk takes nearly as long as a large one, they
    would hardly get anywhere. There, credit is saved up for a slice: some chunks right behind each other, a pause of at
    most a fraction of a second for the others, once in many tokens. What is saved while no prompt waits lets a short
    one through at once.
    """

    def __init__(self) -> None:
        self.seconds = MAX_BURST_S
        self._is_in_burst = False

    @property
    def is_for_burst(self) -> bool:
        return self._is_in_burst or self.seconds >= _MIN_BURST_S

    def allows(self, share: PrefillShare) -> bool:
        """Whether a chunk may go now."""
        return self.seconds >= (share.cost_s if self._is_in_burst else max(share.burst_s, share.first_cost_s))

    def refill(self, seconds: float, *, is_wanted: bool) -> None:
        """A decode step went; where no prompt waits for it, no more than a slice is saved."""
        self.seconds += seconds
        if not is_wanted:
            self.seconds = min(self.seconds, MAX_BURST_S)

    def consume(self, share: PrefillShare) -> None:
        self.seconds -= share.cost_s if self._is_in_burst else share.first_cost_s
        self._is_in_burst = share.burst_s > 0.0 and self.seconds >= share.cost_s
        if not share.burst_s and self.seconds < share.cost_s:
            self.seconds = 0.0  # what is left over would become two chunks between the same two steps, now and then

    def reset(self) -> None:
        """Nobody decodes: there is no one to slow down."""
        self.seconds, self._is_in_burst = MAX_BURST_S, False


def refill_per_token_s(micro_batches: MicroBatches, *, is_late: bool = False) -> float:
    """What one token of each of the others earns, in seconds."""
    return (LATE_SLOWDOWN if is_late else SLOWDOWN) * micro_batches.period_s - micro_batches.busy_s


def prefill_share(
    step_times: StepTimeModel, refill_s: float, left: int, before: int, max_tokens: int, *, is_for_burst: bool
) -> PrefillShare:
    """What the next chunk of a prompt may be, with `left` tokens to go after `before` of them, while one token of each
    of the others earns `refill_s`."""
    most = min(left, max_tokens)
    key = (refill_s, most, before, is_for_burst)
    found = step_times.shares.get(key)
    if found is None:
        smooth = None if is_for_burst else _interleaved_share(step_times, refill_s, most, before)
        found = step_times.shares[key] = smooth or _burst_share(step_times, refill_s, most, before)
    return found


def _interleaved_share(step_times: StepTimeModel, refill_s: float, most: int, before: int) -> PrefillShare | None:
    """A chunk between decode steps; None where it would be too small to be efficient."""
    tokens = step_times.largest_chunk(refill_s, before, most)
    if tokens < min(most, _MIN_CHUNK):
        return None
    cost_s = step_times.chunk_s(tokens, before)
    typical_s = step_times.chunk_s(_TYPICAL_CHUNK, before)
    if tokens < most and cost_s / tokens > _MAX_INEFFICIENCY * typical_s / _TYPICAL_CHUNK:
        return None
    return PrefillShare(tokens, cost_s, cost_s, 0.0)


def _burst_share(step_times: StepTimeModel, refill_s: float, most: int, before: int) -> PrefillShare:
    burst_s = min(max(_MIN_BURST_S, _TOKENS_PER_BURST * refill_s), MAX_BURST_S)
    chunk_s = max(burst_s / (_CHUNKS_PER_BURST + step_times.num_stages - 1), refill_s)
    tokens = max(min(_MIN_CHUNK, most), step_times.largest_chunk(chunk_s, before, most))
    cost_s = step_times.chunk_s(tokens, before)
    # The first chunk of a slice is waited for at every stage, those behind it only at one.
    return PrefillShare(tokens, cost_s, step_times.num_stages * cost_s, burst_s)
