from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from planner.measurements import StageTimes
from potluck.engine.request import Phase, PrefixReuse, TokenSequence
from potluck.engine.scheduler import (
    LATE_SLOWDOWN,
    SLOWDOWN,
    PrefillBudget,
    SchedulerState,
    StepPlan,
    num_admissible,
    schedule,
)
from potluck.engine.settings import EngineLimits
from potluck.engine.step_times import StepTimeModel
from transport.messages.ring import Fork, Op, Open, Release, Sampling, SequenceId

_LIMITS = EngineLimits(context_tokens=5000, kv_capacity_tokens=9000, vocab_size=10**6)


def _pace(
    num_stages: int = 2,
    *,
    step_s: float = 0.010,
    row_s: float = 0.0,
    hops_s: float = 0.0,
    lost_s: float = 0.001,
    token_s: float = 0.001,
    attention: float = 0.0,
) -> StepTimeModel:
    """Stages that are alike. Decode: step_s + row_s a sequence; a chunk: lost_s + token_s · (1 + attention · before) a
    token."""
    times = StageTimes(
        decode=tuple((rows, step_s + row_s * rows) for rows in (1, 2, 4, 8, 16, 32)),
        prefill=tuple(
            (tokens, before, lost_s + tokens * token_s * (1 + attention * before))
            for tokens in (1, 8, 64, 512)
            for before in (0, 4096)
        ),
    )
    return StepTimeModel(num_stages, [times] * num_stages, hops_s)


def _sequence(number: int, prompt_tokens: int = 5, *, phase: Phase = Phase.PREFILL) -> TokenSequence:
    prompt = tuple(range(1000 * number, 1000 * number + prompt_tokens))
    sequence = TokenSequence(SequenceId(number), prompt, Sampling(), max_tokens=10)
    sequence.deadline_s = 1e9
    if phase is not Phase.WAITING:
        sequence.move_to(Phase.PREFILL)
    if phase is Phase.DECODE:
        sequence.step_sent(sequence.prefill_entry(prompt_tokens), 0)
        _comes_back(sequence)
    return sequence


def _comes_back(*sequences: TokenSequence) -> None:
    for sequence in sequences:
        sequence.step_returned()
        sequence.commit(1)


class _Ring:
    """Calls the scheduler as the engine does, and knows what is in flight."""

    def __init__(self, pace: StepTimeModel, *sequences: TokenSequence, limits: EngineLimits = _LIMITS) -> None:
        self.pace = pace
        self.limits = limits
        self.sequences = list(sequences)
        self.credit = PrefillBudget()
        self.now_s = 0.0
        self.steps: list[StepPlan] = []
        self._number = 100

    def next(self, ops: Sequence[Op] = ()) -> StepPlan | None:
        prompts = [each for each in self.sequences if each.phase is Phase.PREFILL and each.num_uncomputed]
        decoding = [each for each in self.sequences if each.phase is Phase.DECODE]
        if not decoding:
            self.credit.reset()
        state = SchedulerState(
            decoding=decoding,
            prompts=prompts,
            ops=ops,
            steps_in_flight=len(self.steps),
            prompt_steps_in_flight=sum(step.has_prompt for step in self.steps),
            prefill_budget=self.credit,
            now_s=self.now_s,
        )
        plan = schedule(state, self.pace, self.limits)
        if plan is not None:
            self._number += 1
            for entry in plan.entries:
                self.of(entry.sequence).step_sent(entry, self._number)
            self.steps.append(plan)
            if plan.refill_s:
                self.credit.refill(plan.refill_s, is_wanted=bool(prompts))
            if plan.share is not None:
                self.credit.consume(plan.share)
        return plan

    def send_all(self) -> list[StepPlan]:
        sent = []
        while (plan := self.next()) is not None:
            sent.append(plan)
        return sent

    def first_comes_back(self) -> StepPlan:
        plan = self.steps.pop(0)
        for entry in plan.entries:
            sequence = self.of(entry.sequence)
            sequence.step_returned()
            if entry.num_logits:
                sequence.commit(1)
        return plan

    def of(self, sequence: SequenceId) -> TokenSequence:
        return next(each for each in self.sequences if each.id == sequence)


def _ids(plan: StepPlan) -> list[int]:
    return [int(entry.sequence) for entry in plan.entries]


def _decoding(count: int) -> list[TokenSequence]:
    return [_sequence(number, phase=Phase.DECODE) for number in range(count)]


def test_groups_fill_the_ring_and_no_more() -> None:
    """(Σ stages + Σ hops) / slowest stage where a step takes as long for many as for one."""
    for num_stages, hops_s, groups in ((1, 0.0, 1), (2, 0.0, 2), (3, 0.0, 3), (2, 0.020, 4), (3, 0.030, 6)):
        ring = _Ring(_pace(num_stages, hops_s=hops_s), *_decoding(12))
        sizes = [len(plan.entries) for plan in ring.send_all()]
        assert len(sizes) == groups and sum(sizes) == 12 and max(sizes) == -(-12 // groups)


def test_few_requests_are_as_many_groups() -> None:
    for count in (1, 2, 3):
        assert [_ids(plan) for plan in _Ring(_pace(4), *_decoding(count)).send_all()] == [[i] for i in range(count)]


def test_larger_steps_are_not_waited_for_where_they_bring_nothing() -> None:
    """Where a step takes as long as its sequences one after another, and hops are long, small groups fill better."""
    slow_rows = _pace(2, step_s=0.0, row_s=0.010, hops_s=0.040)
    assert len(_Ring(slow_rows, *_decoding(8)).send_all()) > 2
    assert len(_Ring(_pace(2), *_decoding(8)).send_all()) == 2


def test_groups_follow_the_times_that_stages_report() -> None:
    pace = _pace(2)
    assert pace.micro_batches(8, 64).count == 2
    for _ in range(40):
        pace.record([(1, 9)] * 4, (0.010, 0.010), 0.080)  # the hops are long: 60 ms
    assert pace.micro_batches(8, 64).count == 8
    for _ in range(200):
        pace.record([(1, 9)], (0.010, 0.080), 0.150)  # and the second stage is eight times slower than it was
        pace.record([(1, 9)] * 2, (0.010, 0.080), None)
        pace.record([(1, 9)] * 4, (0.010, 0.080), None)
    assert pace.micro_batches(8, 64).count == 1


def test_a_full_ring_takes_nothing() -> None:
    ring = _Ring(
        _pace(2),
        *_decoding(2),
        limits=EngineLimits(context_tokens=100, kv_capacity_tokens=100, vocab_size=9, max_steps_in_flight=1),
    )
    assert len(ring.send_all()) == 1


def test_parts_of_a_group_wait_for_each_other() -> None:
    """Four chats that began one after another are in three steps; two steps of two are faster."""
    active = _decoding(4)
    ring = _Ring(_pace(2), *active)
    for step, part in enumerate((active[:2], active[2:3], active[3:]), start=1):
        for sequence in part:
            sequence.step_sent(sequence.decode_entry(), step)
    _comes_back(active[2])
    assert ring.next() is None
    _comes_back(active[3])
    assert [_ids(plan) for plan in ring.send_all()] == [[2, 3]]
    _comes_back(*active[:2])
    assert [_ids(plan) for plan in ring.send_all()] == [[0, 1]]


def test_the_one_that_waited_longest_goes_first() -> None:
    active = _decoding(3)
    active[0].last_step, active[1].last_step, active[2].last_step = 9, 8, 7
    assert [_ids(plan) for plan in _Ring(_pace(2), *active).send_all()] == [[2, 1], [0]]


def test_chunks_of_a_prompt_follow_each_other_and_only_the_last_wants_a_token() -> None:
    ring = _Ring(_pace(2), _sequence(1, 1000))
    sent = ring.send_all()
    assert len(sent) == 3  # one for each stage, and one that is on its way to the first
    while ring.steps:
        ring.first_comes_back()
        sent += ring.send_all() if ring.sequences[0].phase is Phase.PREFILL else []
    entries = [plan.entries[0] for plan in sent]
    assert [entry.start for entry in entries] == [
        sum(len(e.token_ids) for e in entries[:i]) for i in range(len(entries))
    ]
    assert sum(len(entry.token_ids) for entry in entries) == 1000
    assert [entry.num_logits for entry in entries] == [0] * (len(entries) - 1) + [1]
    assert [sum(isinstance(op, Open) for op in plan.ops) for plan in sent] == [1] + [0] * (len(sent) - 1)


def test_chunks_are_the_root_of_work_times_loss_and_shrink_as_attention_grows() -> None:
    """Chunks of √(P · lost / ((S − 1) · token)) tokens: 2,048 · 1 ms / 1 ms → 45."""
    ring = _Ring(_pace(2), _sequence(1, 2048))
    first = ring.next()
    assert first is not None and 40 <= first.num_tokens <= 50
    ring = _Ring(_pace(3), _sequence(1, 4096))  # √(4096 / 2)
    first = ring.next()
    assert first is not None and 40 <= first.num_tokens <= 50
    pace = _pace(2, attention=1 / 512, lost_s=0.01)
    sequence = _sequence(1, 4096)
    ring = _Ring(pace, sequence)
    sizes = []
    while sequence.phase is Phase.PREFILL:
        sizes += [plan.num_tokens for plan in ring.send_all()]
        ring.first_comes_back()
    assert sizes[0] > 2 * sizes[-2] and sizes[-2] >= 32


def test_one_stage_takes_large_chunks_but_none_that_lasts_too_long() -> None:
    assert _ring_first(_pace(1), 5000).num_tokens == 499  # half a second: 1 ms, and 1 ms a token
    assert _ring_first(_pace(1, token_s=0.1), 5000).num_tokens == 32  # a slow device still gets on


def _ring_first(pace: StepTimeModel, prompt_tokens: int) -> StepPlan:
    plan = _Ring(pace, _sequence(1, prompt_tokens)).next()
    assert plan is not None
    return plan


def test_short_prompts_share_a_step_and_a_long_one_travels_alone() -> None:
    active = [_sequence(1, 200), _sequence(2, 200), _sequence(3, 200)]
    assert [_ids(plan) for plan in _Ring(_pace(1), *active).send_all()] == [[1, 2], [3]]
    active = [_sequence(4, 700), _sequence(5, 10)]
    assert [_ids(plan) for plan in _Ring(_pace(1), *active).send_all()] == [[4], [4, 5]]


def test_prompts_that_begin_alike_wait_for_each_other_and_one_that_failed_goes_alone() -> None:
    first, second, third = (_sequence(number, 100) for number in (1, 2, 3))
    second.prompt_ids = first.prompt_ids
    assert [_ids(plan) for plan in _Ring(_pace(1), first, second, third).send_all()] == [[1], [2, 3]]
    chat, first, second = _sequence(7, phase=Phase.DECODE), _sequence(1, 100), _sequence(2, 100)
    first.num_retries = 1
    sent = [_ids(plan) for plan in _Ring(_pace(1), chat, first, second).send_all()]
    assert {tuple(ids) for ids in sent} == {(7,), (1,), (2,)}


def test_one_that_takes_over_kv_opens_with_it_and_computes_the_rest() -> None:
    sequence = _sequence(7, 100)
    sequence.reuse = PrefixReuse(SequenceId(3), 90, moves=True)
    plan = _Ring(_pace(2), sequence).next()
    assert plan is not None
    assert plan.ops == (
        Open(SequenceId(7), sequence.prompt_ids, Sampling()),
        Fork(SequenceId(7), SequenceId(3), 90, True),
    )
    assert (plan.entries[0].start, plan.num_tokens) == (90, 10)
    assert (sequence.num_cached, sequence.num_sent) == (90, 100)


def _time_of_others(pace: StepTimeModel, *, prompt_tokens: int, gaps: int, is_late: bool = False) -> list[float]:
    """Gaps of a chat, two of them in a ring of two stages, while a long prompt is worked on: a ring played through."""
    chats = _decoding(2)
    for chat in chats:
        chat.max_tokens = 10**6
    prompt = _sequence(9, prompt_tokens)
    ring = _Ring(pace, *chats, prompt)
    ring.credit.seconds = 0.0  # what short prompts may take at once is spent
    ring.now_s = 2e9 if is_late else 0.0
    free_at = [0.0] * pace.num_stages
    now, came, arrivals = 0.0, [], []
    queue: list[tuple[float, StepPlan]] = []
    while len(came) <= gaps and prompt.phase is Phase.PREFILL:
        for plan in ring.send_all():
            at = now
            for stage in range(pace.num_stages):
                begin = max(at, free_at[stage])
                entry = plan.entries[0]
                is_chunk = plan.has_prompt
                took = (
                    pace.chunk_s(len(entry.token_ids), entry.start) if is_chunk else pace.decode_s(len(plan.entries))[0]
                )
                at = free_at[stage] = begin + took
            queue.append((at + pace.hops_s, plan))
        now, plan = queue.pop(0)
        ring.first_comes_back()
        if not plan.has_prompt and plan.entries[0].sequence == chats[0].id:
            arrivals.append(now)
            came = [b - a for a, b in pairwise(arrivals)]
    return came


def test_others_slow_down_by_half_at_most_where_small_chunks_are_efficient() -> None:
    """20 ms a token of a chat: chunks between its steps, none of which takes more than 10 ms."""
    pace = _pace(2, token_s=0.0005, lost_s=0.0005)
    unloaded_s = pace.micro_batches(2, 64).period_s
    gaps = _time_of_others(pace, prompt_tokens=4000, gaps=200)
    assert max(gaps) <= SLOWDOWN * unloaded_s * 1.01
    assert sum(gaps) / len(gaps) > 1.3 * unloaded_s  # and the prompt gets on


def test_others_pause_rarely_where_small_chunks_are_not() -> None:
    """A chunk of one token takes 20 ms, as one of 40 does: they come in slices, a pause once in many tokens."""
    pace = _pace(2, step_s=0.003, token_s=0.0005, lost_s=0.02)
    unloaded_s = pace.micro_batches(2, 64).period_s
    gaps = _time_of_others(pace, prompt_tokens=4000, gaps=400)
    assert sorted(gaps)[int(0.95 * len(gaps))] <= SLOWDOWN * unloaded_s
    assert max(gaps) < 0.3
    assert 1.2 * unloaded_s < sum(gaps) / len(gaps) <= SLOWDOWN * unloaded_s * 1.1


def test_a_prompt_that_is_late_may_slow_others_more() -> None:
    pace = _pace(2, token_s=0.0005, lost_s=0.0005)
    gaps = _time_of_others(pace, prompt_tokens=4000, gaps=200, is_late=True)
    unloaded_s = pace.micro_batches(2, 64).period_s
    # The first chunk finds the second stage busy with nothing that it could hide behind.
    assert SLOWDOWN * unloaded_s * 1.1 < max(gaps[1:]) <= LATE_SLOWDOWN * unloaded_s * 1.01


def test_a_short_prompt_does_not_wait_for_its_share() -> None:
    prompt = _sequence(9, 60)
    sent = _Ring(_pace(2), *_decoding(2), prompt).send_all()
    assert [plan.has_prompt for plan in sent[:3]] == [False, False, True]
    assert prompt.num_uncomputed == 0


def test_with_one_stage_a_chunk_joins_the_decodes() -> None:
    ring = _Ring(_pace(1), *_decoding(2), _sequence(9, 100))
    first = ring.next()
    assert first is not None and first.has_prompt and _ids(first)[:2] == [0, 1] and _ids(first)[2:] == [9]


def test_ops_go_first_and_alone_if_they_must() -> None:
    release = Release(SequenceId(9))
    plan = _Ring(_pace(2)).next([release])
    assert plan is not None and plan.ops == (release,) and plan.entries == ()
    plan = _Ring(_pace(2), _sequence(1)).next([release])
    assert plan is not None and [type(op) for op in plan.ops] == [Release, Open]
    assert _Ring(_pace(2)).next() is None


def test_admission_is_first_come_first_served_and_asks_for_what_is_known() -> None:
    limits = EngineLimits(context_tokens=1000, kv_capacity_tokens=2000, vocab_size=9, max_active_sequences=3)
    waiting = [_sequence(1, 80, phase=Phase.WAITING), _sequence(2, 5, phase=Phase.WAITING)]
    for sequence in waiting:
        sequence.max_tokens = 500

    def admitted(free_tokens: int, num_active: int) -> int:
        return num_admissible(waiting, free_tokens=free_tokens, num_active=num_active, limits=limits)

    assert admitted(96, 0) == 1  # 81 tokens in whole claims
    assert admitted(95, 0) == 0
    assert admitted(96 + 32, 0) == 1  # the second one must leave some for the first
    assert admitted(96 + 32 + 64, 0) == 2  # and for itself
    assert admitted(1000, 2) == 1
    assert admitted(1000, 3) == 0
