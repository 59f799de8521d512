"""Messages between the HTTP process and the engine process.

Every submitted request ends in exactly one terminal event: `Finished`, `Aborted` or `RequestFailed`.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from transport.errors import PotluckError
from transport.messages.ring import Fence, Sampling

MAX_CLIENT_MESSAGE_BYTES = 32 * 2**20
MAX_STOP_STRINGS, MAX_STOP_CHARS, MAX_TOP_LOGPROBS = 16, 1024, 20
FinishReason = Literal["stop", "length"]
Priority = Literal["interactive", "batch"]
EngineState = Literal["starting", "ready", "down"]


class Submit(Struct, frozen=True, tag="submit", kw_only=True):
    """One request: chat messages (dicts of the model's chat template), a text, or token ids; exactly one of the three.

    `max_tokens` None means up to the model's context. `num_choices` sequences get sampling.choice 0, 1, ….
    "batch" yields to "interactive" ones, but not for ever.
    """

    request: str
    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    sampling: Sampling
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    num_choices: int = 1
    priority: Priority = "interactive"


class Cancel(Struct, frozen=True, tag="cancel"):
    request: str


class TokenLogprob(Struct, frozen=True, array_like=True):
    """A token's text and bytes with its logprob; `top` are the alternatives, best first."""

    token: str
    token_bytes: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...] = ()


class Accepted(Struct, frozen=True, tag="accepted"):
    request: str
    prompt_tokens: int


class Delta(Struct, frozen=True, tag="delta"):
    """New text of one choice: whole characters only, never part of a stop string."""

    request: str
    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class ChoiceFinished(Struct, frozen=True, tag="choice_finished"):
    request: str
    choice: int
    reason: FinishReason
    completion_tokens: int


class Finished(Struct, frozen=True, tag="finished", kw_only=True):
    """All choices are done. `ttft_s` is from submission to the first token, `decode_s` from the first to the last.

    `cached_tokens` of the prompt were not computed: their KV was there. With several choices it is the first one's."""

    request: str
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    decode_s: float
    cached_tokens: int = 0


class Aborted(Struct, frozen=True, tag="aborted"):
    """The client cancelled."""

    request: str


class RequestFailed(Struct, frozen=True, tag="request_failed", kw_only=True):
    request: str
    code: str
    message: str
    hint: str = ""
    param: str | None = None


def request_failed(request: str, error: PotluckError) -> RequestFailed:
    """The terminal event that reports `error` to a client."""
    param = getattr(error, "param", None)
    return RequestFailed(request=request, code=error.code, message=error.message, hint=error.hint, param=param)


class EngineReady(Struct, frozen=True, tag="engine_ready", kw_only=True):
    """The ring is warm. Sent to each client that connects, too."""

    model: str
    context_tokens: int
    fence: Fence | None = None


class EngineDown(Struct, frozen=True, tag="engine_down"):
    """The ring can't serve any more; requests submitted from now on fail at once with this error."""

    code: str
    message: str
    hint: str = ""
    fence: Fence | None = None


class RingAttached(Struct, frozen=True, tag="ring_attached"):
    """The engine listens for that ring's last stage."""

    fence: Fence
    endpoint: str


class Ping(Struct, frozen=True, tag="ping"):
    """Ask the engine for a `Pong`: its state and counters."""


class Pong(Struct, frozen=True, tag="pong", kw_only=True):
    state: EngineState
    active_requests: int
    queued_requests: int
    steps_in_flight: int
    sequences: int
    kv_tokens: int = 0
    """Of running requests, on each stage."""
    cached_kv_tokens: int = 0
    """Of requests that are over, kept for prompts that begin alike."""


ClientMessage = Submit | Cancel | Ping
EngineEvent = (
    Accepted
    | Delta
    | ChoiceFinished
    | Finished
    | Aborted
    | RequestFailed
    | EngineReady
    | EngineDown
    | RingAttached
    | Pong
)
