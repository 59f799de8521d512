"""Streams with known arrivals: which token came when, who counted, and what is not a whole answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from potluck.measure.endpoint import StreamedAnswer, answer_of
from potluck.measure.http_client import HttpExchange

DONE = "data: [DONE]\n\n"


def delta(text: str, name: str = "content") -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, "delta": {name: text}}]}) + "\n\n"


def usage(tokens: int, **more: Any) -> str:
    counts = {"prompt_tokens": 9, "completion_tokens": tokens, **more}
    return "data: " + json.dumps({"choices": [], "usage": counts}) + "\n\n"


def exchange(*arrivals: tuple[float, str], status: int = 200, is_done: bool = True, error: str = "") -> HttpExchange:
    found = HttpExchange(error=error)
    found.reader.status = status
    for at_s, text in arrivals:
        found.reader.body += text.encode()
        found.reader.marks.append((len(found.reader.body), at_s))
    found.reader.is_done = is_done
    return found


def read(*arrivals: tuple[float, str], **how: Any) -> StreamedAnswer:
    return answer_of(exchange(*arrivals, **how))


def test_one_token_an_event() -> None:
    answer = read((1.0, delta("")), (2.0, delta("a")), (2.5, delta("b")), (2.75, delta("c") + usage(3) + DONE))
    assert [(each.at_s, each.tokens) for each in answer.arrivals] == [(2.0, 1), (2.5, 1), (2.75, 1)]
    assert answer.gaps_s == answer.pauses_s == [0.5, 0.25]
    assert (answer.tokens, answer.prompt_tokens, answer.cached_tokens, answer.text) == (3, 9, None, "abc")
    assert answer.error == "" and answer.has_usage


def test_an_event_cut_in_two_came_with_its_last_byte() -> None:
    text = delta("a")
    answer = read((1.0, text[:20]), (2.0, text[20:] + delta("b")[:5]), (3.0, delta("b")[5:] + DONE))
    assert [each.at_s for each in answer.arrivals] == [2.0, 3.0]


def test_tokens_that_came_together_share_their_gap() -> None:
    # Two events at once, and one event that holds two tokens of the five that usage counts.
    answer = read((1.0, delta("a")), (2.0, delta("b") + delta("c")), (3.0, delta("d" * 50) + usage(5) + DONE))
    assert [each.tokens for each in answer.arrivals] == [1, 2, 2]
    assert answer.gaps_s == [0.5, 0.5, 0.5, 0.5]
    assert answer.pauses_s == [1.0, 1.0]


def test_tokens_without_text_of_their_own_are_all_somewhere() -> None:
    for tokens in (3, 4, 7, 40):
        answer = read((1.0, delta("a")), (2.0, delta("bcd")), (3.0, delta("ef") + usage(tokens) + DONE))
        assert sum(each.tokens for each in answer.arrivals) == tokens
        assert len(answer.gaps_s) == tokens - answer.arrivals[0].tokens


def test_without_usage_events_count() -> None:
    answer = read((1.0, delta("a")), (2.0, delta("b") + DONE))
    assert (answer.tokens, answer.prompt_tokens, answer.has_usage, answer.error) == (2, None, False, "")


def test_cached_tokens_and_thoughts() -> None:
    answer = read(
        (1.0, delta("hm", "reasoning_content")), (2.0, usage(1, prompt_tokens_details={"cached_tokens": 4}) + DONE)
    )
    assert (answer.cached_tokens, answer.text) == (4, "hm")
    assert read((1.0, delta("a") + usage(1, prompt_tokens_details=None) + DONE)).cached_tokens is None


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (exchange((1.0, delta("a"))), "ended before"),
        (exchange((1.0, delta("a")), is_done=False, error="no news for 3 s"), "no news for 3 s"),
        (exchange((1.0, DONE)), "without text"),
        (exchange((1.0, delta("a") + 'data: {"error": {"message": "a stage is gone"}}\n\n')), "a stage is gone"),
        (exchange((1.0, "data: nonsense\n\n" + DONE)), "nonsense"),
        (exchange((1.0, "data: [1]\n\n" + DONE)), "not a chunk"),
        (exchange((1.0, '{"error": {"message": "no such\\nmodel"}}'), status=404), "404: no such model"),
        (exchange((1.0, "<html>bad gateway"), status=502), "502: <html>bad gateway"),
        (HttpExchange(error="no connection: refused"), "no connection: refused"),
    ],
)
def test_what_is_not_an_answer(found: HttpExchange, says: str) -> None:
    assert says in answer_of(found).error


def test_a_cut_answer_keeps_what_came() -> None:
    answer = read((1.0, delta("a")), (3.0, delta("b")), is_done=False)
    assert answer.gaps_s == [2.0] and answer.error
