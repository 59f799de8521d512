"""How much of the ring prompts may take while others decode, so that their tokens come evenly enough."""

from __future__ import annotations

from dataclasses import dataclass

from potluck.engine.pace import Grouping, RingPace

SLOWDOWN = 1.5
"""While prompts are worked on, the others' tokens come at most so many times more slowly, on average and in 95 of 100
gaps."""

LATE_SLOWDOWN = 2.0
"""The same, once a prompt waits for longer than it should."""

_LEAST_SLICE_S = 0.2
MOST_SLICE_S = 0.3
_GAPS_OF_A_SLICE = 40
"""A pause that comes once in so many tokens is not among 95 of 100 gaps."""

_SLICE_CHUNKS = 4
_EFFICIENT = 1.25
_TYPICAL_CHUNK = 64
_LEAST_CHUNK = 8


@dataclass(frozen=True, slots=True)
class Share:
    """The next chunk's tokens and what it costs the others in seconds, as the first of a slice or behind another;
    `slice_s`: so much is saved up before it goes, 0 for a chunk between decode steps."""

    tokens: int
    cost_s: float
    first_cost_s: float
    slice_s: float


class PromptCredit:
    """Time that prompts may take from the others: earned by their decode steps, spent by chunks.

    Small chunks between decode steps are smooth, but where a small chunk takes nearly as long as a large one, they
    would hardly get anywhere. There, credit is saved up for a slice: some chunks right behind each other, a pause of at
    most a fraction of a second for the others, once in many tokens. What is saved while no prompt waits lets a short
    one through at once.
    """

    def __init__(self) -> None:
        self.seconds = MOST_SLICE_S
        self._is_in_slice = False

    @property
    def is_for_slice(self) -> bool:
        return self._is_in_slice or self.seconds >= _LEAST_SLICE_S

    def allows(self, share: Share) -> bool:
        """Whether a chunk may go now."""
        return self.seconds >= (share.cost_s if self._is_in_slice else max(share.slice_s, share.first_cost_s))

    def earn(self, seconds: float, *, is_wanted: bool) -> None:
        """A decode step went; where no prompt waits for it, no more than a slice is saved."""
        self.seconds += seconds
        if not is_wanted:
            self.seconds = min(self.seconds, MOST_SLICE_S)

    def spend(self, share: Share) -> None:
        self.seconds -= share.cost_s if self._is_in_slice else share.first_cost_s
        self._is_in_slice = share.slice_s > 0.0 and self.seconds >= share.cost_s
        if not share.slice_s and self.seconds < share.cost_s:
            self.seconds = 0.0  # what is left over would become two chunks between the same two steps, now and then

    def rest(self) -> None:
        """Nobody decodes: there is no one to slow down."""
        self.seconds, self._is_in_slice = MOST_SLICE_S, False


def earnings(grouping: Grouping, *, is_late: bool = False) -> float:
    """What one token of each of the others earns, in seconds."""
    return (LATE_SLOWDOWN if is_late else SLOWDOWN) * grouping.period_s - grouping.busy_s


def share_of(pace: RingPace, earned_s: float, left: int, before: int, most_tokens: int, *, is_for_slice: bool) -> Share:
    """What the next chunk of a prompt may be, with `left` tokens to go after `before` of them, while one token of each
    of the others earns `earned_s`."""
    most = min(left, most_tokens)
    key = (earned_s, most, before, is_for_slice)
    found = pace.shares.get(key)
    if found is None:
        smooth = None if is_for_slice else _smooth(pace, earned_s, most, before)
        found = pace.shares[key] = smooth or _slice(pace, earned_s, most, before)
    return found


def _smooth(pace: RingPace, earned_s: float, most: int, before: int) -> Share | None:
    """A chunk between decode steps; None where it would be too small to be efficient."""
    tokens = pace.largest_chunk(earned_s, before, most)
    if tokens < min(most, _LEAST_CHUNK):
        return None
    cost_s = pace.chunk_s(tokens, before)
    typical_s = pace.chunk_s(_TYPICAL_CHUNK, before)
    if tokens < most and cost_s / tokens > _EFFICIENT * typical_s / _TYPICAL_CHUNK:
        return None
    return Share(tokens, cost_s, cost_s, 0.0)


def _slice(pace: RingPace, earned_s: float, most: int, before: int) -> Share:
    slice_s = min(max(_LEAST_SLICE_S, _GAPS_OF_A_SLICE * earned_s), MOST_SLICE_S)
    chunk_s = max(slice_s / (_SLICE_CHUNKS + pace.num_stages - 1), earned_s)
    tokens = max(min(_LEAST_CHUNK, most), pace.largest_chunk(chunk_s, before, most))
    cost_s = pace.chunk_s(tokens, before)
    # The first chunk of a slice is waited for at every stage, those behind it only at one.
    return Share(tokens, cost_s, pace.num_stages * cost_s, slice_s)
