"""A workload says when requests come and what they say, drawn from a seed and fitted to lengths."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from potluck.measure.endpoint import LoadEndpoint, chat_once
from potluck.store.store import Store
from potluck.system.paths import home_dir
from transport.errors import ConfigError, ModelNotFound

if TYPE_CHECKING:
    from potluck.engine.tokenizer import Tokenizer

# Common words that nearly every tokenizer has as one token each when a space stands before them.
WORDS = tuple(
    """
    time year people way day man thing woman life child world school state family student group country problem hand
    part place case week company system program question work government number night point home water room mother
    area money story fact month lot right study book eye job word business issue side kind head house service friend
    father power hour game line end member law car city community name president team minute idea body information
    back parent face level office door health person art war history party result change morning reason research
    girl guy moment air teacher force education foot boy age policy process music market sense nation plan college
    interest death experience effect use class control care field development role effort rate heart drug show
    leader light voice wife police mind price report decision son view relationship town road arm difference value
    building action season society tax director position player record paper space ground form event official matter
    center couple site project activity star table need court oil situation cost industry figure street image phone
    data picture practice piece land product doctor wall patient worker news test movie north love support
    technology
    """.split()  # noqa: SIM905
)
_OPENING = ("Tell", "me", "a", "long", "story", "with", "all", "of", "these", "words", "in", "it")
_TAGS = 10**6
_SPREAD = 618_033  # coprime to _TAGS: neighbours differ from the first digit on


def poisson_arrivals(rate_per_s: float, seed: int) -> Iterator[float]:
    """Seconds after the start, without end: gaps are exponential with mean 1/rate. The same seed, the same arrivals."""
    draw = random.Random(seed)
    at_s = 0.0
    while True:
        at_s += draw.expovariate(rate_per_s)
        yield at_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMix:
    """What chats are like: user messages of some `lengths` in tokens, each with its weight, answers of `output` tokens,
    the first `shared_prefix` tokens of the first message the same in all, `turns` messages a chat."""

    lengths: tuple[tuple[int, float], ...]
    output: int
    shared_prefix: int = 0
    turns: int = 1


@dataclass(frozen=True, slots=True)
class UserMessage:
    """One user message; `tokens` are what the prompt is asked to have (its first turn with the template's own)."""

    text: str
    tokens: int


class ChatGenerator:
    """Chats without end. Lengths and words come from `seed`, so that they are the same in every run; `salt` makes a
    run's messages differ from all others from their first word on, so that no cache of another run or round helps.

    `words_of(tokens)` says how many words, after the first, make a prompt that long."""

    def __init__(self, mix: ChatMix, words_of: Callable[[int], int], *, seed: int, salt: int) -> None:
        self._mix = mix
        self._words_of = words_of
        self._draw = random.Random(seed)
        self._tags = (tag(salt + number) for number in itertools.count(1))
        self._prefix = shared_words(mix.shared_prefix, salt)

    def __iter__(self) -> Iterator[list[UserMessage]]:
        return self

    def __next__(self) -> list[UserMessage]:
        lengths, weights = zip(*self._mix.lengths, strict=True)
        drawn = self._draw.choices(lengths, weights, k=self._mix.turns)
        return [self._message(tokens, self._prefix if turn == 0 else ()) for turn, tokens in enumerate(drawn)]

    def _message(self, tokens: int, prefix: Sequence[str]) -> UserMessage:
        words = max(0, self._words_of(tokens) - len(prefix))
        return UserMessage(" ".join([*prefix, next(self._tags), *prompt_words(words, self._draw)]), tokens)


def tag(number: int) -> str:
    """Six digits, different for each number below a million, from the first digit on for neighbours."""
    return f"{number * _SPREAD % _TAGS:06d}"


def prompt_words(count: int, draw: random.Random) -> list[str]:
    """A request for a long answer as far as `count` words allow, then any words."""
    return [*_OPENING[:count], *draw.choices(WORDS, k=max(0, count - len(_OPENING)))]


def shared_words(count: int, salt: int) -> list[str]:
    return random.Random(salt).choices(WORDS, k=count)


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


async def by_usage(endpoint: LoadEndpoint, *, silence_s: float) -> WordsOf | None:
    """A line through two prompts that the endpoint counts; None where it does not count."""
    counted = []
    for words in _PROBES:
        answer = await chat_once(endpoint, _message(words)["content"], 1, silence_s=silence_s)
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
