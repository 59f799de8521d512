"""Sections measure one chat, many chats, a filled ring and a long prompt on rings that are up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from bench.ring.driven_ring import DrivenRing, DrivenRun
from bench.ring.engine_ring import EngineRing
from bench.targets import (
    STREAMS,
    DecodeSteps,
    Round,
    alternated,
    bound_tokens_per_s,
    busiest,
    filled_ring,
    gaps_between,
)
from potluck.engine.input_processor import ChatTokenizer
from potluck.measure.load_run import fit, prompt_words
from potluck.measure.ring import BenchRing
from potluck.measure.summary import decode_tokens_per_s, percentile

_MAX_WORD_LETTERS = 9


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
        tag = f"{self._random.randrange(10**6):06d}"
        # No long ones: a prompt is then as long as it should be to within a few letters, whatever the tokenizer.
        words = [word for word in prompt_words(2 * num_tokens, self._random) if len(word) <= _MAX_WORD_LETTERS]

        def text(count: int) -> str:
            return " ".join([tag, *words[:count]])

        def length(count: int) -> int:
            return len(self._tokenizer.encode_chat([{"role": "user", "content": text(count)}]).ids)

        return text(fit(num_tokens, length))


_STORY = "Write a long story about a lighthouse keeper and a storm. " * 8
_PROMPT, _OUTPUT = 64, 128
_DRIVEN_STEPS = 24
_GROUPS = (1, 2, 4)
_STEADY_S, _STEADY_TOKENS = 6.0, 1500


def single(unsplit: BenchRing, one: EngineRing, two: EngineRing, number: int) -> Round:
    """One chat over both stages, over one, and over an engine with its one stage in the same process."""
    values: Round = {}

    def in_one_process() -> None:
        values["unsplit, one stream"] = unsplit.run(_STORY, _OUTPUT).tokens_per_s

    def of(ring: EngineRing, name: str) -> None:
        (answer,) = ring.run_requests([ring.request(_OUTPUT, text=_STORY, may_end=True)])
        if answer.done.completion_tokens < _OUTPUT // 2:
            raise RuntimeError(f"the answer ended after {answer.done.completion_tokens} tokens")
        values[name] = answer.decode_tokens_per_s

    turns: list[Callable[[], None]] = [
        in_one_process,
        lambda: of(one, "1 stage, one stream"),
        lambda: of(two, "2 stages, one stream"),
    ]
    for turn in alternated(turns, number):
        turn()
    return values


def streams(ring: EngineRing, driven: DrivenRing, prompts: Prompts) -> Round:
    """1, 2, 4 and 8 chats; beside each number, the same rows in steps that are driven without an engine."""
    values: Round = {}
    hops_s = 0.0
    for count in (1, *STREAMS):
        apart = [drive(driven, prompts, groups, count // groups) for groups in _GROUPS if count % groups == 0]
        if count == 1:
            hops_s = values["hops s"] = sum_of_hops_s(apart[0])
        tokens_per_s, steps = run_streams(ring, prompts, count, _OUTPUT)
        groups = count / steps[0].rows
        values |= {
            f"{count} streams": tokens_per_s,
            f"{count} streams rows": steps[0].rows,
            f"{count} streams max stage s": max(step.seconds for step in steps),
            f"{count} streams bound": bound_tokens_per_s(
                groups, steps[0].rows, [step.seconds for step in steps], hops_s
            ),
            f"{count} streams driven bound": max(
                bound_tokens_per_s(one.groups, one.rows, one.stage_s, hops_s) for one in apart
            ),
            f"{count} driven": max(one.tokens_per_s for one in apart),
        }
    return values


def filled(ring: EngineRing, driven: DrivenRing, prompts: Prompts) -> Round:
    """4·B* chats against 1 / max stage, by the stages' own clocks."""
    apart = drive(driven, prompts, 1, 1)
    count = 4 * filled_ring(apart.stage_s, sum_of_hops_s(apart))
    tokens_per_s, steps = run_steadily(ring, prompts, count)
    return {
        "filled": tokens_per_s,
        "filled bound": min(step.rows / step.seconds for step in steps),
        "filled streams": count,
        "filled rows": steps[0].rows,
    }


def run_streams(ring: EngineRing, prompts: Prompts, count: int, num_tokens: int) -> tuple[float, list[DecodeSteps]]:
    """Tokens/s while all `count` chats decode, and each stage's steps."""
    requests = [ring.request(num_tokens, text=text) for text in prompts.texts(count, _PROMPT)]
    before = ring.stats()
    answers = ring.run_requests(requests)
    after = ring.stats()
    tokens = sum(answer.done.completion_tokens for answer in answers)
    rate = decode_tokens_per_s([answer.chunks_s for answer in answers], tokens)
    if rate == 0:
        raise RuntimeError(f"{count} chats never decoded at the same time")
    return rate, [busiest(old, new) for old, new in zip(before, after, strict=True)]


def run_steadily(
    ring: EngineRing, prompts: Prompts, count: int, *, seconds: float = _STEADY_S, most_tokens: int = _STEADY_TOKENS
) -> tuple[float, list[DecodeSteps]]:
    """The same for more chats than can all be read before the first is answered: for some seconds once all of them
    decode, by the last stage's count. Raises RuntimeError if one is over before with its `most_tokens`."""
    client = ring.client
    chats = [client.start(ring.request(most_tokens, text=text)) for text in prompts.texts(count, _PROMPT)]
    client.wait(lambda: all(chat.chunks_s for chat in chats))
    before, begin_s = ring.stats(), time.perf_counter()
    client.wait_for_s(seconds)
    after, end_s = ring.stats(), time.perf_counter()
    num_ended = sum(chat.is_over for chat in chats)
    for chat in chats:
        client.cancel(chat)
    client.wait(lambda: all(chat.is_over for chat in chats))
    if num_ended:
        raise RuntimeError(f"{num_ended} of {count} chats ended while they were measured")
    rate = (after[-1].decode_tokens - before[-1].decode_tokens) / (end_s - begin_s)
    return rate, [busiest(old, new) for old, new in zip(before, after, strict=True)]


def drive(driven: DrivenRing, prompts: Prompts, groups: int, rows: int, steps: int = _DRIVEN_STEPS) -> DrivenRun:
    return driven.decode(groups, rows, prompts=[prompts.ids(_PROMPT) for _ in range(groups * rows)], steps=steps)


def sum_of_hops_s(alone: DrivenRun) -> float:
    """All hops of a step together, from one group that goes round alone."""
    return max(0.0, alone.round_trip_s - sum(alone.stage_s))


_LONG_TOKENS = 4096
_CHATS = 4
_CHAT_PROMPT, _CHAT_OUTPUT = 64, 1800
_BEFORE_S = 6.0


def intrusion(ring: EngineRing, prompts: Prompts) -> Round:
    """A prompt of 4,096 tokens, alone and then beside 4 chats: how long it takes, and what becomes of their gaps."""
    client = ring.client
    alone_text, beside_text = prompts.texts(2, _LONG_TOKENS)
    (alone,) = ring.run_requests([ring.request(4, text=alone_text)])
    chats = [client.start(ring.request(_CHAT_OUTPUT, text=text)) for text in prompts.texts(_CHATS, _CHAT_PROMPT)]
    client.wait(lambda: all(chat.chunks_s for chat in chats))
    begin_s = time.perf_counter()
    client.wait_for_s(_BEFORE_S)
    beside = client.start(ring.request(4, text=beside_text))
    client.wait(lambda: bool(beside.chunks_s))
    num_ended = sum(chat.is_over for chat in chats)
    for chat in chats:
        client.cancel(chat)
    client.wait(lambda: beside.is_over and all(chat.is_over for chat in chats))
    if num_ended:
        raise RuntimeError(f"{num_ended} chats ended before the long prompt was through")
    values: Round = {"long alone": alone.done.ttft_s, "long beside": beside.done.ttft_s}
    spans = {"before": (begin_s, beside.started_s), "during": (beside.started_s, beside.chunks_s[0])}
    for name, (begin, end) in spans.items():
        gaps = [gap for chat in chats for gap in gaps_between(chat.chunks_s, begin, end)]
        values |= {f"gap p{percent} {name}": percentile(gaps, percent) or 0.0 for percent in (50, 95, 99)}
        values |= {f"gap max {name}": max(gaps), f"chat tokens/s {name}": len(gaps) / (end - begin)}
    return values
