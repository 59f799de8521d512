"""A sequence's life as a state machine: waiting → prefill → decode → an end; or back to waiting."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from transport.messages import Entry, Fork, Op, Open, Sampling, SequenceId
from transport.requests import Priority

KV_CLAIM_TOKENS = 32
"""KV memory is claimed for a sequence in so many positions at a time."""

_CRUMB_TOKENS = 8


class Phase(Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"


_ENDS = frozenset({Phase.FINISHED, Phase.ABORTED, Phase.FAILED})
_AFTER = {
    Phase.WAITING: frozenset({Phase.PREFILL}) | _ENDS,  # one that was preempted may turn out to be finished
    Phase.PREFILL: frozenset({Phase.DECODE, Phase.WAITING}) | _ENDS,
    Phase.DECODE: frozenset({Phase.WAITING}) | _ENDS,
    Phase.FINISHED: frozenset(),
    Phase.ABORTED: frozenset(),
    Phase.FAILED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Reuse:
    """KV that is there already: positions [0, length) of `source`, which ends with it if it `moves`."""

    source: SequenceId
    length: int
    moves: bool


class Sequence:
    """One prompt and what has been committed after it. The ids here are the only truth; KV can be rebuilt from them.

    Positions [0, `num_sent`) have been sent into the ring, or their KV was there before. A decoding sequence has at
    most one step in flight, since its next input is that step's result; chunks of ids that are known follow each other
    without waiting. `due_s` is when its first token is due: who is due first is served first.
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
        self.due_s = 0.0
        self.is_opened = False
        self.reuse: Reuse | None = None
        self.num_cached = 0
        self.num_retries = 0
        self.claimed_tokens = 0

    @property
    def is_over(self) -> bool:
        return self.phase in _ENDS

    @property
    def most_tokens(self) -> int:
        """KV that it may come to hold."""
        return len(self.prompt_ids) + self.max_tokens

    @property
    def length(self) -> int:
        """Ids known: prompt and committed."""
        return len(self.prompt_ids) + len(self.generated)

    @property
    def wanted_claim(self) -> int:
        """KV memory for all known ids and the next one, in whole claims."""
        return min(self.most_tokens, -(-(self.length + 1) // KV_CLAIM_TOKENS) * KV_CLAIM_TOKENS)

    @property
    def num_left(self) -> int:
        """Known ids that are to be computed still, before the next token can be sampled."""
        start = self.num_sent if self.is_opened or self.reuse is None else self.reuse.length
        return self.length - start

    def ids(self, first: int, last: int) -> tuple[int, ...]:
        """Known ids at positions [first, last)."""
        num_prompt = len(self.prompt_ids)
        if last <= num_prompt:
            return self.prompt_ids[first:last]
        return (*self.prompt_ids[first:], *self.generated[max(0, first - num_prompt) : last - num_prompt])

    def to(self, phase: Phase) -> None:
        assert phase in _AFTER[self.phase], f"sequence {self.id}: {self.phase.value} → {phase.value}"
        self.phase = phase

    def decode_entry(self) -> Entry:
        """The last committed token, at its position."""
        return Entry(self.id, self.num_sent, (self.generated[-1],), 1)

    def opening(self) -> tuple[Op, ...]:
        """What makes it known to the stages; nothing if it is."""
        if self.is_opened:
            return ()
        opened = Open(self.id, self.prompt_ids, self.sampling)
        reuse = self.reuse
        return (opened,) if reuse is None else (opened, Fork(self.id, reuse.source, reuse.length, reuse.moves))

    def prefill_entry(self, max_tokens: int) -> Entry:
        """The next chunk of the known ids, and what is hardly worth another one; only the last one asks for a token."""
        length = self.length
        start = length - self.num_left
        last = start + max_tokens
        if last + _CRUMB_TOKENS > length:
            last = length
        return Entry(self.id, start, self.ids(start, last), int(last == length))

    def sent(self, entry: Entry, step: int) -> None:
        if not self.is_opened:
            self.is_opened = True
            if self.reuse is not None:
                self.num_sent = self.num_cached = self.reuse.length
        assert entry.start == self.num_sent
        self.num_sent += len(entry.token_ids)
        self.num_in_flight += 1
        self.last_step = step

    def returned(self) -> None:
        """A step that it was in has come back."""
        self.num_in_flight -= 1

    def commit(self, token_id: int) -> None:
        """Append a sampled token; what was sampled is never sampled again."""
        assert self.num_sent == self.length
        if self.phase is Phase.PREFILL:
            self.to(Phase.DECODE)
        self.num_retries = 0
        self.generated.append(token_id)

    def restart(self, sequence: SequenceId) -> None:
        """Begin again from the known ids, under a new id, as nothing of it is on the stages any more."""
        self.to(Phase.WAITING)
        self.id = sequence
        self.num_sent = self.num_in_flight = self.num_cached = 0
        self.last_step = -1
        self.is_opened = False
        self.reuse = None
