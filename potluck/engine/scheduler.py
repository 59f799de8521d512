"""What goes into the ring next. Pure: it reads sequences and limits, and returns a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from potluck.engine.limits import EngineLimits
from potluck.engine.sequences import Phase
from potluck.engine.sequences import Sequence as TokenSequence
from transport.messages import Entry, Op, Open, Release


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """A step that is not numbered yet."""

    ops: tuple[Op, ...]
    entries: tuple[Entry, ...]
    is_prefill: bool

    @property
    def num_tokens(self) -> int:
        return sum(len(entry.token_ids) for entry in self.entries)


def num_admissible(waiting: Iterable[TokenSequence], *, free_tokens: int, num_active: int, limits: EngineLimits) -> int:
    """How many of the waiting sequences, first come first served, can start now.

    One that does not fit holds back those after it, so that a long request is not passed over for ever.
    """
    count = 0
    for sequence in waiting:
        free_tokens -= sequence.reserved_tokens
        if free_tokens < 0 or num_active + count >= limits.max_active_sequences:
            break
        count += 1
    return count


def schedule(
    active: Sequence[TokenSequence],
    releases: Sequence[Release],
    *,
    num_steps_in_flight: int,
    last_was_prefill: bool,
    limits: EngineLimits,
) -> StepPlan | None:
    """The next step, or None if the ring is full or there is nothing to send.

    `active` are the admitted sequences, oldest first. Decodes go before prompts, but every second step is a prompt's
    as long as one waits. Decodes go in groups of ⌈decoding / steps in flight⌉, so that each stage has one to work on,
    and in no more groups than that makes: a part of a group waits for the rest, since a stage reads its weights for
    each step anew, whoever is in it.
    """
    if num_steps_in_flight >= limits.max_steps_in_flight:
        return None
    decoding = [sequence for sequence in active if sequence.phase is Phase.DECODE]
    ready = [sequence for sequence in decoding if sequence.is_ready_to_decode]
    prompts = [sequence for sequence in active if sequence.phase is Phase.PREFILL and sequence.num_prompt_left]
    group = min(-(-len(decoding) // limits.max_steps_in_flight), limits.prefill_chunk_tokens)
    may_decode = bool(ready) and _num_groups_in_flight(decoding) < -(-len(decoding) // group)
    if may_decode and (last_was_prefill or not prompts):
        longest_waiting = sorted(ready, key=lambda sequence: sequence.last_step)[:group]
        entries = tuple(sequence.decode_entry() for sequence in longest_waiting)
        return StepPlan(ops=tuple(releases), entries=entries, is_prefill=False)
    if prompts:
        budget = limits.busy_chunk_tokens if decoding else limits.prefill_chunk_tokens
        chosen, entries = _prefill(prompts, budget)
        opens = tuple(
            Open(sequence.id, sequence.prompt_ids, sequence.sampling) for sequence in chosen if not sequence.is_opened
        )
        # Releases first: the memory that they free may be what lets the new ones in.
        return StepPlan(ops=(*releases, *opens), entries=entries, is_prefill=True)
    if releases:
        return StepPlan(ops=tuple(releases), entries=(), is_prefill=False)
    return None


def _num_groups_in_flight(decoding: Sequence[TokenSequence]) -> int:
    return len({sequence.last_step for sequence in decoding if not sequence.is_ready_to_decode})


def _prefill(prompts: Sequence[TokenSequence], budget: int) -> tuple[list[TokenSequence], tuple[Entry, ...]]:
    """The oldest prompt's next chunk, or several whole prompts that fit into one.

    A prompt that is sent in parts travels alone: if one part fails, the next one must fail without company.
    """
    first = prompts[0]
    chosen, entries = [first], [first.prefill_entry(budget)]
    if first.is_opened or first.num_prompt_left > budget:
        return chosen, tuple(entries)
    budget -= first.num_prompt_left
    for sequence in prompts[1:]:
        if sequence.is_opened or sequence.num_prompt_left > budget:
            break
        chosen.append(sequence)
        entries.append(sequence.prefill_entry(budget))
        budget -= sequence.num_prompt_left
    return chosen, tuple(entries)
