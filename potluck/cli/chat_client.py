"""The chat client streams an answer from a head's own API, as any client would."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from potluck.head.client import auth_headers
from transport.errors import DeadlineExceeded, NotRunning, PotluckError, RingDown, error_from_code

# Between two events of a stream: a long prompt on slow devices may take minutes, and keepalives come meanwhile.
_STREAM_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAnswer:
    """`ttft_s` and `tokens_per_s` as the client sees them; the first token is not counted in the rate."""

    text: str
    tokens: int
    finish_reason: str
    ttft_s: float
    tokens_per_s: float


def stream_chat(
    url: str,
    messages: Sequence[dict[str, str]],
    *,
    model: str,
    on_text: Callable[[str], None],
    options: dict[str, Any] | None = None,
) -> ChatAnswer:
    """Stream an answer of this user's head. Raises what it says, NotRunning if nobody answers, RingDown mid-stream."""
    body = {
        "model": model,
        "messages": list(messages),
        "stream": True,
        "stream_options": {"include_usage": True},
        **(options or {}),
    }
    started = time.perf_counter()
    first_s = last_s = 0.0
    text, tokens, reason = "", 0, ""
    try:
        with (
            httpx.Client(timeout=httpx.Timeout(_STREAM_TIMEOUT_S, connect=5.0), trust_env=False) as client,
            client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=auth_headers()) as response,
        ):
            if response.status_code != 200:
                raise _error(json.loads(response.read()))
            for event in _sse_events(response):
                for choice in event.get("choices", ()):
                    piece = choice["delta"].get("content") or ""
                    if piece:
                        last_s = time.perf_counter()
                        first_s = first_s or last_s
                        text += piece
                        on_text(piece)
                    reason = choice.get("finish_reason") or reason
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
    except httpx.ConnectError as error:
        raise NotRunning(f"nobody answers at {url}", hint="start a head with: potluck up MODEL") from error
    except httpx.TimeoutException as error:
        raise DeadlineExceeded(
            f"{url} sent nothing for {_STREAM_TIMEOUT_S:.0f} s", hint="see: potluck status"
        ) from error
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        raise RingDown(f"the answer broke off: {error}", hint="see: potluck status") from error
    seconds = last_s - first_s
    return ChatAnswer(
        text=text,
        tokens=tokens,
        finish_reason=reason,
        ttft_s=first_s - started if first_s else 0.0,
        tokens_per_s=(tokens - 1) / seconds if tokens > 1 and seconds > 0 else 0.0,
    )


def _sse_events(response: httpx.Response) -> Any:
    for line in response.iter_lines():
        if not line.startswith("data:"):
            continue
        payload = line[5:].strip()
        if payload == "[DONE]":
            return
        event = json.loads(payload)
        if "error" in event:
            raise _error(event)
        yield event


def _error(body: dict[str, Any]) -> PotluckError:
    error = body.get("error") or {}
    return error_from_code(str(error.get("code")), str(error.get("message")), hint="see: potluck status")
