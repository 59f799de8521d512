"""A load is chats (when they come and what they say, drawn from a seed and fitted to lengths) and one trial of them.

Closed loop: so many clients, each sends its next request when it has its answer. Open loop: requests come when they are
due, whatever has been answered.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import gc
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potluck.measure.endpoint import LoadEndpoint, StreamedAnswer, answer_of, chat_once
from potluck.measure.http_client import HttpExchange
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


_REFUSED = (429, 503)
_DEFAULT_WAIT_S = 1.0
_LONGEST_WAIT_S = 30.0
_AFTER_FAILURE_S = 0.5
_HOPELESS_FAILURES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCell:
    """Closed loop with `clients`, or open loop with `rate_per_s`: exactly one is given."""

    clients: int | None = None
    rate_per_s: float | None = None

    def __str__(self) -> str:
        if self.clients is None:
            return f"{self.rate_per_s:g}/s"
        return f"{self.clients} client{'' if self.clients == 1 else 's'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadWindow:
    """How long: load for `warm_up_s`, then measured for `duration_s` or, if that is None, until `requests` are
    answered; then answers under way may take `drain_s`. A request is given up after `silence_s` without news."""

    warm_up_s: float
    duration_s: float | None
    requests: int | None
    drain_s: float
    silence_s: float


@dataclass(slots=True)
class LoadRequest:
    """Due when the load says, sent as soon as the client can. `tokens` are the prompt's as asked for."""

    scheduled_s: float
    tokens: int
    turn: int
    is_measured: bool
    exchange: HttpExchange = field(default_factory=HttpExchange)

    @property
    def is_refused(self) -> bool:
        return self.exchange.reader.status in _REFUSED


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOutcome:
    """What a trial gave. The window is [begin_s, end_s); `cut_s` is when requests without an answer were left.
    `cpu_s` is this process's in the window. `statuses` are a Potluck head's at the window's ends, with their times.
    `failure` is why requests failed, if nothing else happened to them."""

    requests: list[LoadRequest]
    begin_s: float
    end_s: float
    cut_s: float
    cpu_s: float
    statuses: list[tuple[float, dict[str, Any]]]
    is_interrupted: bool
    failure: str


class LoadRun:
    """`LoadRun(…).run()` once. Ends early, with what there is, when `stop` is set, or when only failures come."""

    def __init__(
        self,
        endpoint: LoadEndpoint,
        chats: Iterator[list[UserMessage]],
        cell: LoadCell,
        span: LoadWindow,
        *,
        output: int,
        turns: int,
        seed: int,
        stop: asyncio.Event,
    ) -> None:
        self._endpoint = endpoint
        self._chats = chats
        self._cell = cell
        self._span = span
        self._output = output
        self._turns = turns
        self._seed = seed
        self._stop = stop
        self._over = asyncio.Event()
        self._left = asyncio.Event()
        self._requests: list[LoadRequest] = []
        self._num_measured = 0
        self._num_failed = 0
        self._has_success = False
        self._failure = ""
        self._cpu_s: list[float] = []
        self._statuses: list[tuple[float, dict[str, Any]]] = []

    async def run(self) -> LoadOutcome:
        # The collector would walk through every library's objects while answers arrive.
        gc.collect()
        gc.freeze()
        self._begin_s = time.perf_counter() + self._span.warm_up_s
        duration_s = self._span.duration_s
        self._end_s = float("inf") if duration_s is None else self._begin_s + duration_s
        if duration_s is not None:
            self._leave_after(self._span.warm_up_s + duration_s + self._span.drain_s)
        load = asyncio.create_task(self._closed() if self._cell.clients is not None else self._open())
        edges = asyncio.create_task(self._edges())
        over, stop = asyncio.create_task(self._over.wait()), asyncio.create_task(self._stop.wait())
        await asyncio.wait([load, over, stop], return_when=asyncio.FIRST_COMPLETED)
        cut_s = time.perf_counter()
        for task in (load, over, stop):
            task.cancel()
        await asyncio.wait([load, over, stop])
        if not load.cancelled():
            load.result()
        self._end_s = max(self._begin_s, min(self._end_s, cut_s))
        self._left.set()
        await edges
        return LoadOutcome(
            requests=self._requests,
            begin_s=self._begin_s,
            end_s=self._end_s,
            cut_s=cut_s,
            cpu_s=self._cpu_s[1] - self._cpu_s[0],
            statuses=self._statuses,
            is_interrupted=self._stop.is_set(),
            failure="" if self._has_success else self._failure,
        )

    async def _edges(self) -> None:
        """Looks at the head and at this process's CPU time where the window begins and where it ends."""
        for scheduled_s in (self._begin_s, self._end_s):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._left.wait(), max(0.0, scheduled_s - time.perf_counter()))
            await self._sample_status()

    async def _sample_status(self) -> None:
        self._cpu_s.append(time.process_time())
        status = await self._endpoint.status()
        if status is not None:
            self._statuses.append((time.perf_counter(), status))

    async def _closed(self) -> None:
        async with asyncio.TaskGroup() as clients:
            for _ in range(self._cell.clients or 0):
                clients.create_task(self._client())

    async def _client(self) -> None:
        while not self._has_enough():
            await self._run_chat(next(self._chats), None)

    async def _open(self) -> None:
        assert self._cell.rate_per_s is not None
        start_s = time.perf_counter()
        async with asyncio.TaskGroup() as chats:
            for after_s in poisson_arrivals(self._cell.rate_per_s / self._turns, self._seed):
                scheduled_s = start_s + after_s
                if scheduled_s >= self._end_s:
                    break
                await asyncio.sleep(max(0.0, scheduled_s - time.perf_counter()))
                if self._has_enough():
                    break
                chats.create_task(self._run_chat(next(self._chats), scheduled_s))
            if self._span.duration_s is None:
                self._leave_after(self._span.drain_s)

    def _leave_after(self, seconds: float) -> None:
        asyncio.get_running_loop().call_later(seconds, self._over.set)

    def _has_enough(self) -> bool:
        wanted = self._span.requests
        return time.perf_counter() >= self._end_s or (wanted is not None and self._num_measured >= wanted)

    async def _run_chat(self, chat: list[UserMessage], scheduled_s: float | None) -> None:
        """The chat's turns one after another, each with the answers before it; the first is due then, or now."""
        messages: list[dict[str, str]] = []
        for turn, message in enumerate(chat):
            if turn and self._has_enough():
                return
            messages.append({"role": "user", "content": message.text})
            request = await self._send_until_taken(messages, message, turn, scheduled_s)
            scheduled_s = None
            if turn + 1 < len(chat):
                answer = answer_of(request.exchange)
                if answer.error:
                    return
                messages.append({"role": "assistant", "content": answer.text})

    async def _send_until_taken(
        self, messages: list[dict[str, str]], message: UserMessage, turn: int, scheduled_s: float | None
    ) -> LoadRequest:
        """A closed loop's client waits and asks again when it is refused; each time counts as a request of its own."""
        waited_s = 0.0
        while True:
            request = self._new_request(message, turn, scheduled_s)
            await self._endpoint.chat(messages, self._output, request.exchange, silence_s=self._span.silence_s)
            if self._cell.clients is None or not request.is_refused:
                await self._judge(request)
                return request
            wait_s = retry_after_s(request.exchange.reader.headers.get("retry-after"), time.time())
            waited_s += wait_s
            if waited_s > self._span.silence_s or time.perf_counter() + wait_s > self._end_s:
                await asyncio.sleep(max(0.0, min(wait_s, self._end_s - time.perf_counter())))
                return request
            self._num_measured -= request.is_measured
            await asyncio.sleep(wait_s)

    def _new_request(self, message: UserMessage, turn: int, scheduled_s: float | None) -> LoadRequest:
        scheduled_s = time.perf_counter() if scheduled_s is None else scheduled_s
        is_measured = scheduled_s >= self._begin_s and not self._has_enough()
        request = LoadRequest(scheduled_s, message.tokens, turn, is_measured)
        self._requests.append(request)
        self._num_measured += is_measured
        return request

    async def _judge(self, request: LoadRequest) -> None:
        """Ends the load when all that comes are failures; a client that fails does not ask again at once."""
        if b"[DONE]" in request.exchange.reader.body[-64:]:
            self._has_success = True
            return
        answer: StreamedAnswer = answer_of(request.exchange)
        if not answer.error or request.is_refused:
            self._has_success = self._has_success or not answer.error
            return
        self._num_failed += 1
        self._failure = answer.error
        if self._num_failed >= _HOPELESS_FAILURES and not self._has_success:
            self._over.set()
        await asyncio.sleep(_AFTER_FAILURE_S)


def retry_after_s(value: str | None, now_s: float) -> float:
    """The header's seconds, or its date from `now_s` (Unix time) on, within sensible bounds."""
    try:
        wait_s = float(value or _DEFAULT_WAIT_S)
    except ValueError:
        try:
            wait_s = parsedate_to_datetime(value or "").timestamp() - now_s
        except ValueError:
            wait_s = _DEFAULT_WAIT_S
    return min(_LONGEST_WAIT_S, max(0.1, wait_s)) if wait_s == wait_s else _DEFAULT_WAIT_S
