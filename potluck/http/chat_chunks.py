"""Engine events → server-sent events of chat completion chunks, in bytes. What all chunks share is encoded once."""

from __future__ import annotations

from typing import Any

import msgspec

from potluck.http.chat_response import CompletionHead, logprobs_body, usage_body
from transport.requests import ChoiceFinished, Delta, Finished

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class ChunkEncoder:
    """One request's chunks."""

    def __init__(self, head: CompletionHead, *, num_choices: int, wants_logprobs: bool, with_usage: bool) -> None:
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


def error_event(body: dict[str, Any]) -> bytes:
    return b"event: error\ndata: " + _encode(body) + b"\n\n"
