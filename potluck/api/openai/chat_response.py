"""Chat responses turn engine events into OpenAI's bodies: one complete answer, or chunks in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from transport.messages.requests import ChoiceFinished, Delta, Finished, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionHeader:
    """What every body of an answer carries. `created` is in seconds since 1970; `service_tier` only if one was asked
    for."""

    id: str
    model: str
    created: int
    service_tier: str | None

    def fields(self, kind: str) -> dict[str, Any]:
        found = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return found if self.service_tier is None else {**found, "service_tier": self.service_tier}


class CompletionBuilder:
    """One request's answer under way, to be sent at once."""

    def __init__(self, head: CompletionHeader, *, num_choices: int, wants_logprobs: bool) -> None:
        self._head = head
        self._wants_logprobs = wants_logprobs
        self._texts: list[list[str]] = [[] for _ in range(num_choices)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(num_choices)]
        self._reasons: list[str | None] = [None] * num_choices

    def add(self, event: Delta | ChoiceFinished) -> None:
        match event:
            case Delta(choice=choice, text=text, logprobs=logprobs):
                self._texts[choice].append(text)
                self._logprobs[choice].extend(logprobs)
            case ChoiceFinished(choice=choice, reason=reason):
                self._reasons[choice] = reason

    def body(self, finished: Finished) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(texts), "refusal": None},
                "logprobs": logprobs_body(tuple(self._logprobs[index])) if self._wants_logprobs else None,
                "finish_reason": self._reasons[index],
            }
            for index, texts in enumerate(self._texts)
        ]
        return {**self._head.fields("chat.completion"), "choices": choices, "usage": usage_body(finished)}


def usage_body(finished: Finished) -> dict[str, Any]:
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
    }


def logprobs_body(logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    content = [
        {
            **_token_body(item.token, item.token_bytes, item.logprob),
            "top_logprobs": [_token_body(*alternative) for alternative in item.top],
        }
        for item in logprobs
    ]
    return {"content": content, "refusal": None}


def _token_body(token: str, token_bytes: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token_bytes)}


_encode = msgspec.json.Encoder().encode


class ChunkEncoder:
    """One request's chunks."""

    def __init__(self, head: CompletionHeader, *, num_choices: int, wants_logprobs: bool, with_usage: bool) -> None:
        """`with_usage`: one more chunk, at the end, has the numbers, and the others say that they have none."""
        self._num_choices = num_choices
        self._wants_logprobs = wants_logprobs
        self._opening = b"data: " + _encode(head.fields("chat.completion.chunk"))[:-1] + b',"choices":'
        self._closing = b',"usage":null}\n\n' if with_usage else b"}\n\n"
        self._before_text = [
            self._opening + b'[{"index":%d,"delta":{"content":' % index for index in range(num_choices)
        ]
        self._after_text = b'},"logprobs":null,"finish_reason":null}]' + self._closing

    def opening(self) -> bytes:
        """The chunks that say who speaks, one a choice."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._chunk(index, delta) for index in range(self._num_choices))

    def chunk(self, event: Delta | ChoiceFinished) -> bytes:
        match event:
            case Delta(choice=choice, text=text, logprobs=logprobs):
                if self._wants_logprobs:
                    return self._chunk(choice, {"content": text}, logprobs=logprobs_body(logprobs))
                return self._before_text[choice] + _encode(text) + self._after_text
            case ChoiceFinished(choice=choice, reason=reason):
                return self._chunk(choice, {}, reason=reason)

    def usage(self, finished: Finished) -> bytes:
        return self._opening + b'[],"usage":' + _encode(usage_body(finished)) + b"}\n\n"

    def _chunk(self, index: int, delta: dict[str, Any], *, logprobs: Any = None, reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._opening + _encode([choice]) + self._closing
