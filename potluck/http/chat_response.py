"""Engine events → bodies of chat completions, and the parts that whole ones and chunks share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transport.requests import ChoiceFinished, Delta, Finished, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionHead:
    """What every body of an answer carries. `created` is in seconds since 1970; `service_tier` only if one was asked
    for."""

    id: str
    model: str
    created: int
    service_tier: str | None

    def fields(self, kind: str) -> dict[str, Any]:
        found = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return found if self.service_tier is None else {**found, "service_tier": self.service_tier}


class Completion:
    """One request's answer under way, to be sent as a whole."""

    def __init__(self, head: CompletionHead, *, num_choices: int, wants_logprobs: bool) -> None:
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
