"""When requests come and what they are, drawn from a seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
class Mix:
    """What chats are like: user messages of some `lengths` in tokens, each with its weight, answers of `output` tokens,
    the first `shared_prefix` tokens of the first message the same in all, `turns` messages a chat."""

    lengths: tuple[tuple[int, float], ...]
    output: int
    shared_prefix: int = 0
    turns: int = 1


@dataclass(frozen=True, slots=True)
class Message:
    """One user message; `tokens` are what the prompt is asked to have (its first turn with the template's own)."""

    text: str
    tokens: int


class Chats:
    """Chats without end. Lengths and words come from `seed`, so that they are the same in every run; `salt` makes a
    run's messages differ from all others from their first word on, so that no cache of another run or round helps.

    `words_of(tokens)` says how many words, after the first, make a prompt that long."""

    def __init__(self, mix: Mix, words_of: Callable[[int], int], *, seed: int, salt: int) -> None:
        self._mix = mix
        self._words_of = words_of
        self._draw = random.Random(seed)
        self._tags = (tag(salt + number) for number in itertools.count(1))
        self._prefix = shared_words(mix.shared_prefix, salt)

    def __iter__(self) -> Iterator[list[Message]]:
        return self

    def __next__(self) -> list[Message]:
        lengths, weights = zip(*self._mix.lengths, strict=True)
        drawn = self._draw.choices(lengths, weights, k=self._mix.turns)
        return [self._message(tokens, self._prefix if turn == 0 else ()) for turn, tokens in enumerate(drawn)]

    def _message(self, tokens: int, prefix: Sequence[str]) -> Message:
        words = max(0, self._words_of(tokens) - len(prefix))
        return Message(" ".join([*prefix, next(self._tags), *prompt_words(words, self._draw)]), tokens)


def tag(number: int) -> str:
    """Six digits, different for each number below a million, from the first digit on for neighbours."""
    return f"{number * _SPREAD % _TAGS:06d}"


def prompt_words(count: int, draw: random.Random) -> list[str]:
    """A request for a long answer as far as `count` words allow, then any words."""
    return [*_OPENING[:count], *draw.choices(WORDS, k=max(0, count - len(_OPENING)))]


def shared_words(count: int, salt: int) -> list[str]:
    return random.Random(salt).choices(WORDS, k=count)
