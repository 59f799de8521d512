"""A request as the engine holds it: its choices, each a sequence with its text, and its times."""

from __future__ import annotations

from dataclasses import dataclass, field

from potluck.engine.output import ChoiceOutput
from potluck.engine.sequences import Phase, Sequence


@dataclass(slots=True, kw_only=True)
class Choice:
    """One answer of a request. `ends` are the ids that end it; they are not part of its text. `is_told`: its client
    knows that it is over. `num_cached` tokens of its prompt were not computed."""

    index: int
    sequence: Sequence
    output: ChoiceOutput
    ends: frozenset[int]
    is_told: bool = False
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
