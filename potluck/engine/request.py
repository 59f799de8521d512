"""A request holds choices; each choice holds one sequence, whose phases are a state machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from potluck.engine.detokenizer import ChoiceOutput
from transport.messages.requests import Priority
from transport.messages.ring import Entry, Fork, Op, Open, Sampling, SequenceId

KV_ALLOCATION_TOKENS = 32
"""KV memory is allocated for a sequence in so many positions at a time."""

MIN_TAIL_CHUNK = 8


class Phase(Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"


_TERMINAL_PHASES = frozenset({Phase.FINISHED, Phase.ABORTED, Phase.FAILED})
_NEXT_PHASES = {
    Phase.WAITING: frozenset({Phase.PREFILL}) | _TERMINAL_PHASES,  # one that was preempted may turn out to be finished
    Phase.PREFILL: frozenset({Phase.DECODE, Phase.WAITING}) | _TERMINAL_PHASES,
    Phase.DECODE: frozenset({Phase.WAITING}) | _TERMINAL_PHASES,
    Phase.FINISHED: frozenset(),
    Phase.ABORTED: frozenset(),
    Phase.FAILED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class PrefixReuse:
    """KV that is there already: positions [0, length) of `source`, which ends with it if it `moves`."""

    source: SequenceId
    length: int
    moves: bool


class TokenSequence:
    """One prompt and what has been committed after it. The ids here are the only truth; KV can be rebuilt from them.

    Positions [0, `num_sent`) have been sent into the ring, or their KV was there before. A decoding sequence has at
    most one step in flight, since its next input is that step's result; chunks of ids that are known follow each other
    without waiting. `deadline_s` is when its first token is due: the earliest is served first.
    """

    def __init__(
        self,
        sequence: SequenceId,
        prompt_ids: tuple[int, ...],
        sampling: Sampling,
        *,
        max_tokens: int,
        priority: Priority = "interactive",
    ) -> None:
        self.id = sequence
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.priority: Priority = priority
        self.phase = Phase.WAITING
        self.generated: list[int] = []
        self.num_sent = 0
        self.num_in_flight = 0
        self.last_step = -1
        self.deadline_s = 0.0
        self.is_opened = False
        self.reuse: PrefixReuse | None = None
        self.num_cached = 0
        self.num_retries = 0
        self.allocated_tokens = 0

    @property
    def is_over(self) -> bool:
        return self.phase in _TERMINAL_PHASES

    @property
    def max_total_tokens(self) -> int:
        """KV that it may come to hold."""
        return len(self.prompt_ids) + self.max_tokens

    @property
    def length(self) -> int:
        """Ids known: prompt and committed."""
        return len(self.prompt_ids) + len(self.generated)

    @property
    def wanted_tokens(self) -> int:
        """KV memory for all known ids and the next one, in steps of KV_ALLOCATION_TOKENS."""
        return min(self.max_total_tokens, -(-(self.length + 1) // KV_ALLOCATION_TOKENS) * KV_ALLOCATION_TOKENS)

    @property
    def num_uncomputed(self) -> int:
        """Known ids that are to be computed still, before the next token can be sampled."""
        start = self.num_sent if self.is_opened or self.reuse is None else self.reuse.length
        return self.length - start

    def ids(self, first: int, last: int) -> tuple[int, ...]:
        """Known ids at positions [first, last)."""
        num_prompt = len(self.prompt_ids)
        if last <= num_prompt:
            return self.prompt_ids[first:last]
        return (*self.prompt_ids[first:], *self.generated[max(0, first - num_prompt) : last - num_prompt])

    def move_to(self, phase: Phase) -> None:
        assert phase in _NEXT_PHASES[self.phase], f"sequence {self.id}: {self.phase.value} → {phase.value}"
        self.phase = phase

    def decode_entry(self) -> Entry:
        """The last committed token, at its position."""
        return Entry(self.id, self.num_sent, (self.generated[-1],), 1)

    def opening_ops(self) -> tuple[Op, ...]:
        """What makes it known to the stages; nothing if it is."""
        if self.is_opened:
            return ()
        opened = Open(self.id, self.prompt_ids, self.sampling)
        reuse = self.reuse
        return (opened,) if reuse is None else (opened, Fork(self.id, reuse.source, reuse.length, reuse.moves))

    def prefill_entry(self, max_tokens: int) -> Entry:
        """The next chunk of the known ids, and what is hardly worth another one; only the last one asks for a token."""
        length = self.length
        start = length - self.num_uncomputed
        last = start + max_tokens
        if last + MIN_TAIL_CHUNK > length:
            last = length
        return Entry(self.id, start, self.ids(start, last), int(last == length))

    def step_sent(self, entry: Entry, step: int) -> None:
        if not self.is_opened:
            self.is_opened = True
            if self.reuse is not None:
                self.num_sent = self.num_cached = self.reuse.length
        assert entry.start == self.num_sent
        self.num_sent += len(entry.token_ids)
        self.num_in_flight += 1
        self.last_step = step

    def step_returned(self) -> None:
        """A step that it was in has come back."""
        self.num_in_flight -= 1

    def commit(self, token_id: int) -> None:
        """Append a sampled token; what was sampled is never sampled again."""
        assert self.num_sent == self.length
        if self.phase is Phase.PREFILL:
            self.move_to(Phase.DECODE)
        self.num_retries = 0
        self.generated.append(token_id)

    def restart(self, sequence: SequenceId) -> None:
        """Begin again from the known ids, under a new id, as nothing of it is on the stages any more."""
        self.move_to(Phase.WAITING)
        self.id = sequence
        self.num_sent = self.num_in_flight = self.num_cached = 0
        self.last_step = -1
        self.is_opened = False
        self.reuse = None


@dataclass(slots=True, kw_only=True)
class Choice:
    """One answer of a request. `stop_token_ids` end it; they are not part of its text. `is_reported`: its client
    knows that it is over. `num_cached` tokens of its prompt were not computed."""

    request_id: str
    index: int
    sequence: TokenSequence
    output: ChoiceOutput
    stop_token_ids: frozenset[int]
    is_reported: bool = False
    num_cached: int = 0


@dataclass(slots=True, kw_only=True)
class Request:
    id: str
    choices: tuple[Choice, ...]
    submitted_s: float
    first_token_s: float | None = field(default=None)
    last_token_s: float | None = field(default=None)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.choices[0].sequence.prompt_ids)

    @property
    def num_completion_tokens(self) -> int:
        return sum(len(choice.sequence.generated) for choice in self.choices)

    @property
    def is_queued(self) -> bool:
        return any(choice.sequence.phase is Phase.WAITING for choice in self.choices)

    @property
    def ttft_s(self) -> float:
        return 0.0 if self.first_token_s is None else self.first_token_s - self.submitted_s

    @property
    def decode_s(self) -> float:
        if self.first_token_s is None or self.last_token_s is None:
            return 0.0
        return self.last_token_s - self.first_token_s
