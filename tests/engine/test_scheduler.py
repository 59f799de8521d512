from __future__ import annotations

from collections.abc import Sequence

from potluck.engine.limits import EngineLimits
from potluck.engine.scheduler import StepPlan, num_admissible, schedule
from potluck.engine.sequences import Phase
from potluck.engine.sequences import Sequence as TokenSequence
from transport.messages import Open, Release, Sampling, SequenceId

_LIMITS = EngineLimits(
    context_tokens=1000,
    kv_capacity_tokens=2000,
    vocab_size=100,
    max_steps_in_flight=3,
    prefill_chunk_tokens=100,
    busy_chunk_tokens=10,
)


def _sequence(number: int, prompt_tokens: int = 5, *, phase: Phase = Phase.PREFILL) -> TokenSequence:
    sequence = TokenSequence(SequenceId(number), tuple(range(prompt_tokens)), Sampling(), max_tokens=10)
    if phase is not Phase.WAITING:
        sequence.to(Phase.PREFILL)
    if phase is Phase.DECODE:
        sequence.sent(sequence.prefill_entry(prompt_tokens), 0)
        sequence.returned()
        sequence.commit(1)
    return sequence


def _next(
    active: Sequence[TokenSequence],
    *,
    releases: Sequence[Release] = (),
    num_steps_in_flight: int = 0,
    last_was_prefill: bool = True,
) -> StepPlan | None:
    return schedule(
        active,
        releases,
        num_steps_in_flight=num_steps_in_flight,
        last_was_prefill=last_was_prefill,
        limits=_LIMITS,
    )


def _send(plan: StepPlan | None, active: Sequence[TokenSequence], step: int = 1) -> StepPlan:
    assert plan is not None
    for entry in plan.entries:
        next(sequence for sequence in active if sequence.id == entry.sequence).sent(entry, step)
    return plan


def test_a_full_ring_takes_nothing() -> None:
    active = [_sequence(1, phase=Phase.DECODE)]
    assert _next(active, num_steps_in_flight=2) is not None
    assert _next(active, num_steps_in_flight=3) is None


def test_decodes_split_into_as_many_groups_as_the_ring_takes_steps() -> None:
    active = [_sequence(number, phase=Phase.DECODE) for number in range(7)]
    groups = [[entry.sequence for entry in _send(_next(active), active, step).entries] for step in range(1, 4)]
    assert groups == [[0, 1, 2], [3, 4, 5], [6]]
    assert _next(active) is None


def test_parts_of_a_group_wait_for_each_other() -> None:
    """Four chats that began one after another are in three steps; two steps of two are faster."""
    active = [_sequence(number, phase=Phase.DECODE) for number in range(4)]
    for step, part in enumerate((active[:2], active[2:3], active[3:]), start=1):
        for sequence in part:
            sequence.sent(sequence.decode_entry(), step)

    def comes_back(sequences: Sequence[TokenSequence]) -> None:
        for sequence in sequences:
            sequence.returned()
            sequence.commit(1)

    comes_back(active[2:3])
    assert _next(active) is None
    prompt = _sequence(9, 50)
    plan = _next([*active, prompt])
    assert plan is not None and plan.is_prefill  # a prompt does not wait for them
    comes_back(active[3:])
    assert [entry.sequence for entry in _send(_next(active), active, 4).entries] == [2, 3]
    comes_back(active[:2])
    assert [entry.sequence for entry in _send(_next(active), active, 5).entries] == [0, 1]


def test_the_one_that_waited_longest_goes_first() -> None:
    active = [_sequence(number, phase=Phase.DECODE) for number in range(2)]
    active[0].last_step, active[1].last_step = 9, 8
    plan = _next(active)
    assert plan is not None and [entry.sequence for entry in plan.entries] == [1]


def test_chunks_of_a_prompt_follow_each_other_and_only_the_last_wants_a_token() -> None:
    active = [_sequence(1, 250)]
    plans = [_send(_next(active), active) for _ in range(3)]
    spans = [(plan.entries[0].start, plan.num_tokens, plan.entries[0].num_logits) for plan in plans]
    assert spans == [(0, 100, 0), (100, 100, 0), (200, 50, 1)]
    assert [len([op for op in plan.ops if isinstance(op, Open)]) for plan in plans] == [1, 0, 0]
    assert _next(active) is None


def test_short_prompts_share_a_step_and_a_long_one_travels_alone() -> None:
    active = [_sequence(1, 40), _sequence(2, 40), _sequence(3, 40)]
    assert [entry.sequence for entry in _send(_next(active), active).entries] == [1, 2]
    active = [_sequence(4, 120), _sequence(5, 10)]
    steps = [[entry.sequence for entry in _send(_next(active), active).entries] for _ in range(3)]
    assert steps == [[4], [4], [5]]


def test_prompts_and_decodes_take_turns_and_neither_starves() -> None:
    decoding, prompt = _sequence(1, phase=Phase.DECODE), _sequence(2, 1000)
    kinds, last_was_prefill = [], True
    for step in range(8):
        plan = _send(_next([decoding, prompt], last_was_prefill=last_was_prefill), [decoding, prompt], step)
        last_was_prefill = plan.is_prefill
        kinds.append("prompt" if plan.is_prefill else "decode")
        if not plan.is_prefill:
            decoding.returned()
            decoding.commit(1)
        else:
            assert plan.num_tokens == _LIMITS.busy_chunk_tokens
    assert kinds == ["decode", "prompt"] * 4


def test_releases_go_first_and_alone_if_they_must() -> None:
    release = Release(SequenceId(9))
    plan = _next([], releases=[release])
    assert plan is not None and plan.ops == (release,) and plan.entries == ()
    plan = _next([_sequence(1)], releases=[release])
    assert plan is not None and [type(op) for op in plan.ops] == [Release, Open]
    assert _next([]) is None


def test_admission_is_first_come_first_served() -> None:
    waiting = [_sequence(1, 80, phase=Phase.WAITING), _sequence(2, 5, phase=Phase.WAITING)]
    assert num_admissible(waiting, free_tokens=105, num_active=0, limits=_LIMITS) == 2
    assert num_admissible(waiting, free_tokens=104, num_active=0, limits=_LIMITS) == 1
    assert num_admissible(waiting, free_tokens=89, num_active=0, limits=_LIMITS) == 0
    assert num_admissible(waiting, free_tokens=1000, num_active=63, limits=_LIMITS) == 1
