"""A sequence's life as a state machine: waiting → prefill → decode → finished, aborted or failed."""

from __future__ import annotations

from enum import Enum

from transport.messages import Entry, Sampling, SequenceId


class Phase(Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"


_ENDS = frozenset({Phase.FINISHED, Phase.ABORTED, Phase.FAILED})
_AFTER = {
    Phase.WAITING: frozenset({Phase.PREFILL, Phase.ABORTED, Phase.FAILED}),
    Phase.PREFILL: frozenset({Phase.DECODE}) | _ENDS,
    Phase.DECODE: _ENDS,
    Phase.FINISHED: frozenset(),
    Phase.ABORTED: frozenset(),
    Phase.FAILED: frozenset(),
}


class Sequence:
    """One prompt and what has been committed after it. The ids here are the only truth; KV can be rebuilt from them.

    Positions [0, `num_sent`) have been sent into the ring. A decoding sequence has at most one step in flight, since
    its next input is that step's result; a prompt's chunks follow each other without waiting.
    """

    def __init__(
        self, sequence: SequenceId, prompt_ids: tuple[int, ...], sampling: Sampling, *, max_tokens: int
    ) -> None:
        self.id = sequence
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.phase = Phase.WAITING
        self.generated: list[int] = []
        self.num_sent = 0
        self.num_in_flight = 0
        self.last_step = -1

    @property
    def is_over(self) -> bool:
        return self.phase in _ENDS

    @property
    def reserved_tokens(self) -> int:
        """KV that it may come to hold."""
        return len(self.prompt_ids) + self.max_tokens

    @property
    def length(self) -> int:
        """Ids known: prompt and committed."""
        return len(self.prompt_ids) + len(self.generated)

    @property
    def num_prompt_left(self) -> int:
        """Prompt tokens not sent yet."""
        return max(0, len(self.prompt_ids) - self.num_sent)

    @property
    def is_opened(self) -> bool:
        """Whether the stages have heard of it."""
        return self.num_sent > 0

    @property
    def is_ready_to_decode(self) -> bool:
        return self.phase is Phase.DECODE and self.num_in_flight == 0

    def to(self, phase: Phase) -> None:
        assert phase in _AFTER[self.phase], f"sequence {self.id}: {self.phase.value} → {phase.value}"
        self.phase = phase

    def decode_entry(self) -> Entry:
        """The last committed token, at its position."""
        assert self.num_sent == self.length - 1
        return Entry(self.id, self.num_sent, (self.generated[-1],), 1)

    def prefill_entry(self, max_tokens: int) -> Entry:
        """The prompt's next chunk; only its last one asks for a token."""
        last = min(len(self.prompt_ids), self.num_sent + max_tokens)
        return Entry(self.id, self.num_sent, self.prompt_ids[self.num_sent : last], int(last == len(self.prompt_ids)))

    def sent(self, entry: Entry, step: int) -> None:
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
        self.generated.append(token_id)
