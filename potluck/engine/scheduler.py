"""The scheduler chooses the next step from sequences, times and limits; a prefill budget bounds what prompts take.

Pure: what it reads it is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from msgspec import Struct

from potluck.engine.request import KV_ALLOCATION_TOKENS, TokenSequence
from potluck.engine.settings import EngineLimits
from potluck.engine.step_times import MicroBatches, StepTimeModel
from transport.messages.ring import Entry, Op

_MIN_CHUNK = 32
MAX_PROMPTS_PER_STEP = 8
"""Prompts that share a step."""

_COMMON_PREFIX_TOKENS = 64
_SMALL_CHUNK, _TYPICAL_CHUNK = 8, 128
_MIN_OVERHEAD_S = 0.0003
_MAX_CHUNK_S = 0.5
"""A chunk that a slow stage works on for longer would keep everyone who comes meanwhile waiting."""

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
_TYPICAL_SHARE_TOKENS = 64
_MIN_SHARE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class PrefillShare:
    """The next chunk's tokens and what it costs the others in seconds, as the first of a burst or behind another;
    `burst_s`: so much is saved up before it goes, 0 for a chunk between decode steps."""

    tokens: int
    cost_s: float
    first_cost_s: float
    burst_s: float


class PrefillBudget:
    """A token bucket of time that prompts may take from the others: decode steps refill it, chunks consume it.

    Small chunks between decode steps are smooth, but where a small chunk takes nearly as long as a large one, they
    would hardly get anywhere. There, time is saved up for a burst: some chunks right behind each other, a pause of at
    most a fraction of a second for the others, once in many tokens. What is saved while no prompt waits lets a short
    one through at once.
    """

    def __init__(self) -> None:
        self.seconds = MAX_BURST_S
        self._is_in_burst = False
        self._shares: dict[tuple[float, int, int, bool], PrefillShare] = {}
        self._version = 0

    @property
    def is_for_burst(self) -> bool:
        return self._is_in_burst or self.seconds >= _MIN_BURST_S

    def allows(self, share: PrefillShare) -> bool:
        """Whether a chunk may go now."""
        return self.seconds >= (share.cost_s if self._is_in_burst else max(share.burst_s, share.first_cost_s))

    def refill(self, seconds: float, *, is_wanted: bool) -> None:
        """A decode step went; where no prompt waits for it, no more than a burst is saved."""
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

    def share(
        self, step_times: StepTimeModel, refill_s: float, left: int, before: int, max_tokens: int
    ) -> PrefillShare:
        """What the next chunk of a prompt may be, with `left` tokens to go after `before` of them, while one token of
        each of the others refills `refill_s`."""
        if self._version != step_times.version:
            self._version = step_times.version
            self._shares.clear()
        most = min(left, max_tokens)
        key = (refill_s, most, before, self.is_for_burst)
        found = self._shares.get(key)
        if found is None:
            smooth = None if self.is_for_burst else _interleaved_share(step_times, refill_s, most, before)
            found = self._shares[key] = smooth or _burst_share(step_times, refill_s, most, before)
        return found


def refill_per_token_s(micro_batches: MicroBatches, *, is_late: bool = False) -> float:
    """What one token of each of the others refills, in seconds."""
    return (LATE_SLOWDOWN if is_late else SLOWDOWN) * micro_batches.period_s - micro_batches.busy_s


def _interleaved_share(step_times: StepTimeModel, refill_s: float, most: int, before: int) -> PrefillShare | None:
    """A chunk between decode steps; None where it would be too small to be efficient."""
    tokens = step_times.largest_chunk(refill_s, before, most)
    if tokens < min(most, _MIN_SHARE_TOKENS):
        return None
    cost_s = step_times.chunk_s(tokens, before)
    typical_s = step_times.chunk_s(_TYPICAL_SHARE_TOKENS, before)
    if tokens < most and cost_s / tokens > _MAX_INEFFICIENCY * typical_s / _TYPICAL_SHARE_TOKENS:
        return None
    return PrefillShare(tokens, cost_s, cost_s, 0.0)


def _burst_share(step_times: StepTimeModel, refill_s: float, most: int, before: int) -> PrefillShare:
    burst_s = min(max(_MIN_BURST_S, _TOKENS_PER_BURST * refill_s), MAX_BURST_S)
    chunk_s = max(burst_s / (_CHUNKS_PER_BURST + step_times.num_stages - 1), refill_s)
    tokens = max(min(_MIN_SHARE_TOKENS, most), step_times.largest_chunk(chunk_s, before, most))
    cost_s = step_times.chunk_s(tokens, before)
    # The first chunk of a burst is waited for at every stage, those behind it only at one.
    return PrefillShare(tokens, cost_s, step_times.num_stages * cost_s, burst_s)


class StepPlan(Struct, frozen=True, kw_only=True):
    """A step that is not numbered yet. `share` is what it takes from others that decode, if it has part of a prompt;
    `refill_s` what its decodes refill for prompts."""

    ops: tuple[Op, ...]
    entries: tuple[Entry, ...]
    has_prompt: bool = False
    share: PrefillShare | None = None
    refill_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(len(entry.token_ids) for entry in self.entries)


class SchedulerState(Struct, frozen=True, kw_only=True):
    """What the scheduler looks at. `decoding` and `prompts` are the admitted sequences, prompts those with ids left to
    compute, earliest deadline first. `ops` wait to be sent and go ahead of everything."""

    decoding: Sequence[TokenSequence]
    prompts: Sequence[TokenSequence]
    ops: Sequence[Op]
    steps_in_flight: int
    prompt_steps_in_flight: int
    prefill_budget: PrefillBudget
    now_s: float


def num_admissible(waiting: Iterable[TokenSequence], *, free_tokens: int, num_active: int, limits: EngineLimits) -> int:
    """How many of the waiting sequences, first come first served, can start now.

    Admission is optimistic: it asks for memory for the ids that are known and some more for everyone that runs, not for
    the longest possible answer. One that does not fit holds back those after it, so that a long request is not passed
    over for ever.
    """
    count = 0
    for sequence in waiting:
        free_tokens -= sequence.wanted_tokens - sequence.allocated_tokens
        running = num_active + count
        headroom = 0 if running == 0 else KV_ALLOCATION_TOKENS * (running + 1)
        if free_tokens < headroom or running >= limits.max_active_sequences:
            break
        count += 1
    return count


def schedule(state: SchedulerState, step_times: StepTimeModel, limits: EngineLimits) -> StepPlan | None:
    """The next step, or None if there is nothing to send or the ring has enough.

    Decodes go first, in as many groups as fill the ring (`StepTimeModel.micro_batches`), and in no more: a part of a
    group waits for the rest, since a stage reads its weights again for each step, whoever is in it. Prompts go in
    chunks, earliest deadline first; several that are short share a step. Chunks follow each other without waiting, as
    many as keep every stage busy; while others decode, as `PrefillBudget` allows. With one stage a
    chunk joins the decodes' step.
    """
    if state.steps_in_flight >= limits.max_steps_in_flight:
        return None
    decodes, refill_s, num_groups = _decodes(state, step_times, limits)
    chunk: list[TokenSequence] = []
    entries: tuple[Entry, ...] = ()
    share: PrefillShare | None = None
    prompts = state.prompts
    if prompts and (not decodes or (step_times.num_stages == 1 and not prompts[0].num_retries)):
        if state.decoding:
            share = _prefill_share(state, step_times, refill_s, limits)
            tokens = share.tokens if state.prefill_budget.allows(share) else 0
        else:
            tokens = _chunk_without_decodes(state, step_times, limits)
        if tokens:
            chunk, entries = _prompt_entries(prompts, tokens)
    if not decodes and not chunk:
        # Ops ride with a step; they need one of their own only where none is to come.
        return StepPlan(ops=tuple(state.ops), entries=()) if state.ops and not state.steps_in_flight else None
    opening = tuple(op for sequence in chunk for op in sequence.opening_ops())
    return StepPlan(
        ops=(*state.ops, *opening),
        entries=(*decodes, *entries),
        has_prompt=bool(chunk),
        share=share if chunk else None,
        refill_s=refill_s / num_groups if decodes else 0.0,
    )


def _decodes(
    state: SchedulerState, step_times: StepTimeModel, limits: EngineLimits
) -> tuple[tuple[Entry, ...], float, int]:
    """The decodes of the next step, what one token of each refills, and in how many groups they go."""
    decoding = state.decoding
    if not decoding:
        return (), 0.0, 1
    is_late = bool(state.prompts) and state.now_s > state.prompts[0].deadline_s
    micro_batches = step_times.micro_batches(len(decoding), limits.max_steps_in_flight)
    refill_s = refill_per_token_s(micro_batches, is_late=is_late)
    return _decode_entries(decoding, micro_batches), refill_s, micro_batches.count


def _decode_entries(decoding: Sequence[TokenSequence], micro_batches: MicroBatches) -> tuple[Entry, ...]:
    ready = [sequence for sequence in decoding if sequence.num_in_flight == 0]
    if not ready:
        return ()
    in_flight = len({sequence.last_step for sequence in decoding if sequence.num_in_flight})
    if in_flight >= -(-len(decoding) // micro_batches.size):
        return ()
    if len(ready) > micro_batches.size:
        ready = sorted(ready, key=lambda sequence: sequence.last_step)[: micro_batches.size]
    return tuple(sequence.decode_entry() for sequence in ready)


def _prefill_share(
    state: SchedulerState, step_times: StepTimeModel, refill_s: float, limits: EngineLimits
) -> PrefillShare:
    first = state.prompts[0]
    left = sum(sequence.num_uncomputed for sequence in state.prompts)
    before = first.length - first.num_uncomputed
    max_tokens = limits.fixed_chunk_tokens or limits.max_chunk_tokens
    return state.prefill_budget.share(step_times, refill_s, left, before, max_tokens)


def _chunk_without_decodes(state: SchedulerState, step_times: StepTimeModel, limits: EngineLimits) -> int:
    """Tokens of the next chunk while nobody decodes; 0 if enough are on their way."""
    first = state.prompts[0]
    before = first.length - first.num_uncomputed
    left = sum(sequence.num_uncomputed for sequence in state.prompts)
    tokens = limits.fixed_chunk_tokens or _pipelined_chunk(step_times, left, before, limits.max_chunk_tokens)
    fills = math.ceil(step_times.chunk_trip_s(tokens, before) / step_times.chunk_s(tokens, before)) + 1
    return tokens if state.prompt_steps_in_flight < fills else 0


def _pipelined_chunk(step_times: StepTimeModel, left: int, before: int, max_tokens: int) -> int:
    """The chunk that gets all that is left through S stages soonest: of work W on the slowest stage, with o lost on
    each chunk, one of √(W·o / (S − 1)) seconds, so that later ones have fewer tokens as attention grows."""
    max_chunk = min(left, max_tokens)
    if max_chunk <= _MIN_CHUNK:
        return max_chunk
    max_chunk_s = _MAX_CHUNK_S
    if step_times.num_stages > 1:
        # What a chunk takes is a line between small and large ones; what it takes besides its tokens is lost.
        typical_s, half_s = (step_times.chunk_s(size, before) for size in (_TYPICAL_CHUNK, _TYPICAL_CHUNK // 2))
        slope_s = (typical_s - half_s) / (_TYPICAL_CHUNK // 2)
        overhead_s = max(step_times.chunk_s(_SMALL_CHUNK, before) - _SMALL_CHUNK * slope_s, _MIN_OVERHEAD_S)
        overhead_s += step_times.hops_s / (step_times.num_stages + 1)
        middle = before + left // 2
        work_s = step_times.chunk_s(_TYPICAL_CHUNK, middle) * left / _TYPICAL_CHUNK
        max_chunk_s = min(max_chunk_s, math.sqrt(work_s * overhead_s / (step_times.num_stages - 1)))
    return max(min(_MIN_CHUNK, max_chunk), step_times.largest_chunk(max_chunk_s, before, max_chunk))


def _prompt_entries(prompts: Sequence[TokenSequence], tokens: int) -> tuple[list[TokenSequence], tuple[Entry, ...]]:
    """The first prompt's next chunk, and others that fit completely behind the first one's end."""
    first = prompts[0]
    chosen, entries = [first], [first.prefill_entry(tokens)]
    tokens -= len(entries[0].token_ids)
    if entries[0].num_logits:
        for sequence in prompts[1:MAX_PROMPTS_PER_STEP]:
            if sequence.num_uncomputed > tokens or not _can_join_step(first, sequence):
                break
            chosen.append(sequence)
            entries.append(sequence.prefill_entry(tokens))
            tokens -= sequence.num_uncomputed
    return chosen, tuple(entries)


def _can_join_step(first: TokenSequence, other: TokenSequence) -> bool:
    """Not with one whose step has failed before, and might fail again; and one that begins like the first, at length,
    waits until it can copy that."""
    if first.num_retries or other.num_retries:
        return False
    beginning = first.prompt_ids[:_COMMON_PREFIX_TOKENS]
    is_alike = len(beginning) == _COMMON_PREFIX_TOKENS and other.prompt_ids[:_COMMON_PREFIX_TOKENS] == beginning
    return other.reuse is not None or not is_alike
