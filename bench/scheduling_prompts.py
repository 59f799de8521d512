"""Prompts of a length, no two of which begin alike: a cache of prompts must not help where prompts are measured."""

from __future__ import annotations

import random

from potluck.engine.prepare import ChatTokenizer

_WORDS = "the keeper of the old lighthouse wrote down how the storm came in from the sea and what it left behind "
_FIRST_WORDS = (
    "amber",
    "brick",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heron",
    "ivory",
    "jewel",
    "karst",
    "lotus",
)


class Prompts:
    """Each call gives others, in every run the same ones: those of one `seed` follow each other in a fixed order."""

    def __init__(self, tokenizer: ChatTokenizer, vocab_size: int, seed: int = 0) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._random = random.Random(seed)

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._tokenizer.eos_ids

    def texts(self, count: int, num_tokens: int) -> list[str]:
        """What a user says, of about `num_tokens` with the chat template around it."""
        return [self._text(num_tokens) for _ in range(count)]

    def ids(self, num_tokens: int) -> tuple[int, ...]:
        """Random tokens: a prompt whose text nobody reads."""
        special = self._tokenizer.eos_ids
        return tuple(
            token_id if (token_id := self._random.randrange(self._vocab_size)) not in special else 0
            for _ in range(num_tokens)
        )

    def _text(self, num_tokens: int) -> str:
        begin = " ".join(self._random.choice(_FIRST_WORDS) for _ in range(4))
        words = _WORDS.split() * (num_tokens // 10 + 1)

        def text(count: int) -> str:
            return f"{begin}: tell a long story of {' '.join(words[:count])}"

        low, high = 0, num_tokens
        while low < high:
            middle = (low + high + 1) // 2
            length = len(self._tokenizer.encode_chat([{"role": "user", "content": text(middle)}]).ids)
            low, high = (middle, high) if length <= num_tokens else (low, middle - 1)
        return text(low)
