"""Engine events → bodies of chat completions, whole or in chunks."""

from __future__ import annotations

import time
from typing import Any

from transport.requests import ChoiceFinished, Delta, Finished, TokenLogprob


class Completion:
    """One request's answer under way. Every body carries its id, creation time and model."""

    def __init__(self, request: str, model: str, *, num_choices: int, wants_logprobs: bool, with_usage: bool) -> None:
        self._id = request
        self._model = model
        self._created = int(time.time())
        self._wants_logprobs = wants_logprobs
        self._with_usage = with_usage
        self._texts: list[list[str]] = [[] for _ in range(num_choices)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(num_choices)]
        self._reasons: list[str | None] = [None] * num_choices

    def add(self, event: Delta | ChoiceFinished) -> None:
        """Gather for `body`."""
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
                "logprobs": self._logprobs_body(tuple(self._logprobs[index])),
                "finish_reason": self._reasons[index],
            }
            for index, texts in enumerate(self._texts)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage_body(finished)}

    def opening_chunks(self) -> list[dict[str, Any]]:
        return [
            self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
            for index in range(len(self._texts))
        ]

    def chunk(self, event: Delta | ChoiceFinished) -> dict[str, Any]:
        match event:
            case Delta(choice=choice, text=text, logprobs=logprobs):
                return self._chunk(choice, {"content": text}, logprobs=self._logprobs_body(logprobs))
            case ChoiceFinished(choice=choice, reason=reason):
                return self._chunk(choice, {}, reason=reason)

    def usage_chunk(self, finished: Finished) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage_body(finished)}

    def _chunk(
        self, index: int, delta: dict[str, Any], *, logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self._with_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _logprobs_body(self, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        content = [
            {
                **_token_body(item.token, item.token_bytes, item.logprob),
                "top_logprobs": [_token_body(*alternative) for alternative in item.top],
            }
            for item in logprobs
        ]
        return {"content": content, "refusal": None}


def usage_body(finished: Finished) -> dict[str, int]:
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
    }


def _token_body(token: str, token_bytes: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token_bytes)}
