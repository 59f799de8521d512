"""How many words make a prompt of so many tokens: by a tokenizer, or by what an endpoint counts."""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bench.load_arrivals import prompt_words, tag
from bench.load_endpoint import Endpoint, ask
from potluck.paths import home_dir
from potluck.store import Store
from transport.errors import ConfigError, ModelNotFound

if TYPE_CHECKING:
    from potluck.engine.tokenizer import Tokenizer

WordsOf = Callable[[int], int]
"""Tokens of a prompt, the chat template's included → words of its message after the first."""

_PROBES = (8, 136)


def tokenizer_of(name: str) -> Tokenizer:
    """`name` is a folder or a model of the store. Raises ConfigError or BadCheckpoint."""
    from potluck.engine.tokenizer import Tokenizer  # takes seconds to import, and not every run has one

    if Path(name).is_dir():
        return Tokenizer(Path(name))
    try:
        return Tokenizer(Store(home_dir()).show(name).path)
    except ModelNotFound as error:
        raise ConfigError(
            f"--tokenizer {name}: no such folder, and no such model in the store",
            hint="name a folder with a tokenizer.json, or one of `potluck list`",
        ) from error


def by_tokenizer(tokenizer: Tokenizer) -> WordsOf:
    known: dict[int, int] = {}

    def words_of(tokens: int) -> int:
        if tokens not in known:
            known[tokens] = fit(tokens, lambda words: len(tokenizer.encode_chat([_message(words)]).ids))
        return known[tokens]

    return words_of


def fit(tokens: int, count: Callable[[int], int]) -> int:
    """The most words with which `count(words)` is at most `tokens`; 0 where the template alone is longer."""
    return max(0, bisect.bisect_right(range(tokens + 1), tokens, key=count) - 1)


async def by_usage(endpoint: Endpoint, *, silence_s: float) -> WordsOf | None:
    """A line through two prompts that the endpoint counts; None where it does not count."""
    counted = []
    for words in _PROBES:
        answer = await ask(endpoint, _message(words)["content"], 1, silence_s=silence_s)
        if answer.prompt_tokens is None:
            return None
        counted.append(answer.prompt_tokens)
    return line(_PROBES, counted)


def line(words: tuple[int, int], tokens: list[int]) -> WordsOf | None:
    per_word = (tokens[1] - tokens[0]) / (words[1] - words[0])
    if per_word <= 0:
        return None
    own = tokens[0] - per_word * words[0]
    return lambda asked: max(0, round((asked - own) / per_word))


def _message(words: int) -> dict[str, str]:
    return {"role": "user", "content": " ".join([tag(words + 1), *prompt_words(words, random.Random(words))])}
