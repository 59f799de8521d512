"""Many chats at once, measured at the engine's door: one, a few, and enough to fill the ring."""

from __future__ import annotations

import time
from collections.abc import Callable

from bench.rings import BenchRing
from bench.scheduling_driven import Driven, DrivenRing
from bench.scheduling_engine import EngineRing, times_of
from bench.scheduling_prompts import Prompts
from bench.scheduling_report import STREAMS, DecodeSteps, bound_tokens_per_s, busiest, filled_ring
from bench.stage_report import Round

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
        (answer,) = ring.ask([ring.request(_OUTPUT, text=_STORY, may_end=True)])
        if answer.done.completion_tokens < _OUTPUT // 2:
            raise RuntimeError(f"the answer ended after {answer.done.completion_tokens} tokens")
        values[name] = answer.decode_tokens_per_s

    turns: list[Callable[[], None]] = [
        in_one_process,
        lambda: of(one, "1 stage, one stream"),
        lambda: of(two, "2 stages, one stream"),
    ]
    for turn in turns if number % 2 == 0 else turns[::-1]:
        turn()
    return values


def streams(ring: EngineRing, driven: DrivenRing, prompts: Prompts) -> Round:
    """1, 2, 4 and 8 chats; beside each number, the same rows in steps that are driven without an engine."""
    values: Round = {}
    hops_s = 0.0
    for count in (1, *STREAMS):
        apart = [drive(driven, prompts, groups, count // groups) for groups in _GROUPS if count % groups == 0]
        if count == 1:
            hops_s = values["hops s"] = hops_of(apart[0])
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
    count = 4 * filled_ring(apart.stage_s, hops_of(apart))
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
    answers = ring.ask(requests)
    after = ring.stats()
    rate = times_of(answers).decode_tokens_per_s
    if rate == 0:
        raise RuntimeError(f"{count} chats never decoded at the same time")
    return rate, [busiest(old, new) for old, new in zip(before, after, strict=True)]


def run_steadily(
    ring: EngineRing, prompts: Prompts, count: int, *, seconds: float = _STEADY_S, most_tokens: int = _STEADY_TOKENS
) -> tuple[float, list[DecodeSteps]]:
    """The same for more chats than can all be read before the first is answered: for some seconds once all of them
    decode, by the last stage's count. Raises RuntimeError if one is over before with its `most_tokens`."""
    door = ring.door
    chats = [door.start(ring.request(most_tokens, text=text)) for text in prompts.texts(count, _PROMPT)]
    door.wait(lambda: all(chat.chunks_s for chat in chats))
    before, begin_s = ring.stats(), time.perf_counter()
    door.wait_for_s(seconds)
    after, end_s = ring.stats(), time.perf_counter()
    num_ended = sum(chat.is_over for chat in chats)
    for chat in chats:
        door.cancel(chat)
    door.wait(lambda: all(chat.is_over for chat in chats))
    if num_ended:
        raise RuntimeError(f"{num_ended} of {count} chats ended while they were measured")
    rate = (after[-1].decode_tokens - before[-1].decode_tokens) / (end_s - begin_s)
    return rate, [busiest(old, new) for old, new in zip(before, after, strict=True)]


def drive(driven: DrivenRing, prompts: Prompts, groups: int, rows: int, steps: int = _DRIVEN_STEPS) -> Driven:
    return driven.decode(groups, rows, prompts=[prompts.ids(_PROMPT) for _ in range(groups * rows)], steps=steps)


def hops_of(alone: Driven) -> float:
    """All hops of a step together, from one group that goes round alone."""
    return max(0.0, alone.round_trip_s - sum(alone.stage_s))
