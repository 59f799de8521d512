"""What an exchange was: a streamed chat completion read into arrivals of tokens, usage and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.load_http import Exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """Text that came at one moment, and how many tokens it is taken for."""

    at_s: float
    text: str
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`tokens` and the others are the endpoint's usage; without one `tokens` counts events, and the others are None.
    `error` says why the answer is not whole, "" if it is."""

    status: int | None
    error: str
    arrivals: tuple[Arrival, ...] = ()
    tokens: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    has_usage: bool = False

    @property
    def text(self) -> str:
        return "".join(arrival.text for arrival in self.arrivals)

    @property
    def gaps_s(self) -> list[float]:
        """Between tokens, one a token after the first arrival's: k tokens that came together, g after the ones before,
        took g/k each."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [(new.at_s - old.at_s) / new.tokens for old, new in pairs for _ in range(new.tokens)]

    @property
    def pauses_s(self) -> list[float]:
        """Between arrivals, however many tokens each holds: how long a reader sees nothing new."""
        return [new.at_s - old.at_s for old, new in zip(self.arrivals, self.arrivals[1:], strict=False)]


def answer_of(exchange: Exchange) -> Answer:
    """Also of an exchange that was cut off: what had come until then."""
    reader = exchange.reader
    if reader.status is None:
        return Answer(status=None, error=exchange.error or "no answer")
    if reader.status != 200:
        return Answer(status=reader.status, error=f"{reader.status}: {error_text(bytes(reader.body))}")
    return _streamed(exchange)


def _streamed(exchange: Exchange) -> Answer:
    texts: list[tuple[float, str]] = []
    usage: Mapping[str, Any] = {}
    error, is_whole = exchange.error, False
    for at_s, data in _events(exchange):
        if data == "[DONE]":
            is_whole = True
            continue
        try:
            event = json.loads(data)
            if event.get("error"):
                error = error or f"in the stream: {_message(event)}"
            usage = event.get("usage") or usage
            for choice in event.get("choices") or ():
                delta = choice.get("delta") or {}
                # Models that think aloud stream that apart, under either name.
                text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
                if text:
                    texts.append((at_s, text))
                is_whole = is_whole or choice.get("finish_reason") is not None
        except (ValueError, AttributeError, TypeError):
            error = error or f"not a chunk of a chat completion: {data[:80]}"
    counted = _count(usage, "completion_tokens")
    tokens = len(texts) if counted is None else counted
    arrivals = _spread(texts, tokens)
    if not error and not is_whole:
        error = "the stream ended before the answer"
    elif not error and not arrivals:
        error = "an answer without text"
    details = usage.get("prompt_tokens_details")
    return Answer(
        status=200,
        error=error,
        arrivals=arrivals,
        tokens=tokens,
        prompt_tokens=_count(usage, "prompt_tokens"),
        cached_tokens=_count(details, "cached_tokens") if isinstance(details, Mapping) else None,
        has_usage=counted is not None,
    )


def _events(exchange: Exchange) -> Iterator[tuple[float, str]]:
    """The data of each server-sent event, with the arrival of the byte that completed it."""
    body, marks = exchange.reader.body, iter(exchange.reader.marks)
    have, at_s = 0, 0.0
    offset = 0
    for line in body.splitlines(keepends=True):
        offset += len(line)
        if not line.startswith(b"data:"):
            continue
        while have < offset:
            found = next(marks, None)
            if found is None:
                break
            have, at_s = found
        yield at_s, line[5:].decode("utf-8", "replace").strip()


def _spread(texts: Sequence[tuple[float, str]], tokens: int) -> tuple[Arrival, ...]:
    """`tokens` over the moments at which text came: one for each event, and those beyond (a server may send several in
    one, and holds back incomplete characters) by length in bytes. With fewer than events, each event still has one."""
    moments: list[tuple[float, list[str]]] = []
    for at_s, text in texts:
        if moments and moments[-1][0] == at_s:
            moments[-1][1].append(text)
        else:
            moments.append((at_s, [text]))
    beyond = max(0, tokens - len(texts))
    total = sum(len(text.encode()) for _, text in texts)
    given, seen, arrivals = 0, 0, []
    for at_s, pieces in moments:
        seen += sum(len(piece.encode()) for piece in pieces)
        share = beyond * seen // total - given if total else 0
        given += share
        arrivals.append(Arrival(at_s=at_s, text="".join(pieces), tokens=len(pieces) + share))
    return tuple(arrivals)


def error_text(body: bytes) -> str:
    """The message of an OpenAI error, or what else the body says, in one line."""
    try:
        return _message(json.loads(body))
    except ValueError:
        return " ".join(body[:300].decode("utf-8", "replace").split())


def _message(event: Any) -> str:
    error = event.get("error", event) if isinstance(event, dict) else event
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return " ".join(str(message or error).split())[:300]


def _count(fields: Mapping[str, Any] | None, name: str) -> int | None:
    value = (fields or {}).get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
