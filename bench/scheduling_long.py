"""Long prompts, measured at the engine's door: in chunks, beside running chats, and in a second turn."""

from __future__ import annotations

import time
from collections.abc import Callable

from bench.scheduling_driven import DrivenRing
from bench.scheduling_engine import EngineRing
from bench.scheduling_prompts import Prompts
from bench.scheduling_report import gaps_between, percentile_s
from bench.stage_report import Round

PREFILL_TOKENS = 2048
_CHUNK_TOKENS = 256
_LONG_TOKENS = 4096
TURN_TOKENS = 2000
_CHATS = 4
_CHAT_PROMPT, _CHAT_OUTPUT = 64, 1800
_BEFORE_S = 6.0


def prefill(ring: EngineRing, driven: DrivenRing, prompts: Prompts, number: int) -> Round:
    """Seconds to the first token of 2,048: the engine's chunks, chunks of 256, and one step."""
    values: Round = {}

    def chunked() -> None:
        (answer,) = ring.ask([ring.request(1, ids=prompts.ids(PREFILL_TOKENS))])
        values["prefill"] = answer.done.ttft_s

    def of(name: str, chunk_tokens: int) -> None:
        values[name] = driven.prefill(prompts.ids(PREFILL_TOKENS), chunk_tokens)

    turns: list[Callable[[], None]] = [
        chunked,
        lambda: of("prefill one step", PREFILL_TOKENS),
        lambda: of(f"prefill {_CHUNK_TOKENS}", _CHUNK_TOKENS),
    ]
    for turn in turns if number % 2 == 0 else turns[::-1]:
        turn()
    return values


def intrusion(ring: EngineRing, prompts: Prompts) -> Round:
    """A prompt of 4,096 tokens, alone and then beside 4 chats: how long it takes, and what becomes of their gaps."""
    door = ring.door
    alone_text, beside_text = prompts.texts(2, _LONG_TOKENS)
    (alone,) = ring.ask([ring.request(4, text=alone_text)])
    chats = [door.start(ring.request(_CHAT_OUTPUT, text=text)) for text in prompts.texts(_CHATS, _CHAT_PROMPT)]
    door.wait(lambda: all(chat.chunks_s for chat in chats))
    begin_s = time.perf_counter()
    door.wait_for_s(_BEFORE_S)
    beside = door.start(ring.request(4, text=beside_text))
    door.wait(lambda: bool(beside.chunks_s))
    num_ended = sum(chat.is_over for chat in chats)
    for chat in chats:
        door.cancel(chat)
    door.wait(lambda: beside.is_over and all(chat.is_over for chat in chats))
    if num_ended:
        raise RuntimeError(f"{num_ended} chats ended before the long prompt was through")
    values: Round = {"long alone": alone.done.ttft_s, "long beside": beside.done.ttft_s}
    spans = {"before": (begin_s, beside.started_s), "during": (beside.started_s, beside.chunks_s[0])}
    for name, (begin, end) in spans.items():
        gaps = [gap for chat in chats for gap in gaps_between(chat.chunks_s, begin, end)]
        values |= {f"gap p{percent} {name}": percentile_s(gaps, percent) for percent in (50, 95, 99)}
        values |= {f"gap max {name}": max(gaps), f"chat tokens/s {name}": len(gaps) / (end - begin)}
    return values


def turns(ring: EngineRing, prompts: Prompts, num_tokens: int = TURN_TOKENS) -> Round:
    """The second turn of a chat that began with so many."""
    (text,) = prompts.texts(1, num_tokens)
    (first,) = ring.ask([ring.request(32, text=text)])
    said = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Go on, and say how it ended."},
    ]
    (second,) = ring.ask([ring.request(8, messages=said)])
    return {
        "first turn": first.done.ttft_s,
        "second turn": second.done.ttft_s,
        "second turn prompt tokens": second.done.prompt_tokens,
        "second turn cached tokens": second.done.cached_tokens,
    }
