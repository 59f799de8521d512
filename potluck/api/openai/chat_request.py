"""A chat request is decoded so that every field is honoured or refused by name."""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from potluck.api.errors import ApiError
from potluck.api.json_body import decode_object
from transport.messages.requests import MAX_STOP_CHARS, MAX_STOP_STRINGS, MAX_TOP_LOGPROBS, Submit
from transport.messages.ring import Sampling

# Fields that Potluck does not support (yet), with the values that ask for nothing: OpenAI's documented defaults.
# null is such a value everywhere.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "user": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_REFUSED_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
_REFUSED_IN_STREAM_OPTIONS: dict[str, tuple[Any, ...]] = {"include_obfuscation": (False,)}

# OpenAI's newer name for the system's role; templates know only the older one.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


# What travels to the engine is in 64 bits; the engine knows the tighter limits (context, vocabulary, choices).
_MAX_INT = 2**31 - 1
# Far more than a model's context has room for.
_MAX_NAME_CHARS = 256
_MAX_MESSAGES = 4096
_MAX_PARTS = 1024
_MAX_BIASES = 1024
# An answer's parts are made for as many before the engine has answered.
_MAX_CHOICES = 128


_Stop = Annotated[str, Meta(max_length=MAX_STOP_CHARS)]


class TextPart(Struct, frozen=True):
    type: Literal["text"]
    text: str


class ChatMessage(Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Meta(max_length=_MAX_PARTS)]

    @property
    def text(self) -> str:
        """The parts of a content are paragraphs."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(Struct, frozen=True):
    include_usage: bool = False


class ChatRequest(Struct, frozen=True, kw_only=True):
    """Supported fields with their ranges. `top_k`, `min_p` and `repetition_penalty` are extensions. `service_tier` flex
    yields to the others."""

    model: Annotated[str, Meta(max_length=_MAX_NAME_CHARS)]
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=_MAX_MESSAGES)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=_MAX_INT)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=_MAX_INT)] | None = None
    n: Annotated[int, Meta(ge=1, le=_MAX_CHOICES)] = 1
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=MAX_STOP_STRINGS)] = []
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=_MAX_INT)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        dict[Annotated[int, Meta(ge=0, le=_MAX_INT)], Annotated[float, Meta(ge=-100, le=100)]],
        Meta(max_length=_MAX_BIASES),
    ] = {}
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None

    @property
    def served_tier(self) -> Literal["default", "flex"] | None:
        """The tier that the answer names: there are two. None if the client did not ask."""
        if self.service_tier is None:
            return None
        return "flex" if self.service_tier == "flex" else "default"

    def submit(self, request: str) -> Submit:
        """The request as the engine takes it; a seed that the client left open is drawn here."""
        seed = secrets.randbits(63) if self.seed is None else self.seed & (2**63 - 1)
        return Submit(
            request=request,
            messages=tuple({"role": _ROLES[message.role], "content": message.text} for message in self.messages),
            sampling=Sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                logit_bias=self.logit_bias,
                seed=seed,
                top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            ),
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            num_choices=self.n,
            priority="batch" if self.service_tier == "flex" else "interactive",
        )


def decode_chat_request(body: bytes) -> ChatRequest:
    """Raises ApiError (400) that names the field."""
    try:
        request = msgspec.convert(_cleaned(decode_object(body)), ChatRequest, str_keys=True)
    except msgspec.ValidationError as error:
        message, param = _explain(error)
        raise ApiError(400, message, param=param) from error
    _check_combinations(request)
    return request


def _cleaned(fields: dict[str, Any]) -> dict[str, Any]:
    """Without nulls and without unsupported fields that ask for nothing."""
    cleaned = _check_fields(fields, ChatRequest, _REFUSED, "")
    if isinstance(options := cleaned.get("stream_options"), dict):
        cleaned["stream_options"] = _check_fields(options, StreamOptions, _REFUSED_IN_STREAM_OPTIONS, "stream_options.")
    if isinstance(messages := cleaned.get("messages"), list):
        cleaned["messages"] = [_cleaned_message(message, f"messages[{i}].") for i, message in enumerate(messages)]
    return cleaned


def _cleaned_message(message: Any, path: str) -> Any:
    if not isinstance(message, dict):
        return message
    cleaned = _check_fields(message, ChatMessage, _REFUSED_IN_MESSAGE, path)
    if isinstance(parts := cleaned.get("content"), list):
        cleaned["content"] = [_cleaned_part(part, f"{path}content[{index}].") for index, part in enumerate(parts)]
    return cleaned


def _cleaned_part(part: Any, path: str) -> Any:
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if isinstance(kind, str) and kind != "text":
        raise ApiError(400, f"content of type {kind!r} is not supported; send text", param=f"{path}type")
    return _check_fields(part, TextPart, {}, path)


def _check_fields(
    fields: dict[str, Any], struct: type[Struct], refused: dict[str, tuple[Any, ...]], path: str
) -> dict[str, Any]:
    kept = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name in struct.__struct_fields__:
            kept[name] = value
        elif name not in refused:
            raise ApiError(400, f"unknown field {path}{name}", code="unknown_parameter", param=f"{path}{name}")
        elif not any(_is_same(value, harmless) for harmless in refused[name]):
            raise ApiError(
                400,
                f"{path}{name} is not supported; leave it out or set it to null",
                code="unsupported_parameter",
                param=f"{path}{name}",
            )
    return kept


def _is_same(value: Any, other: Any) -> bool:
    # Not 1 for true.
    return type(value) is type(other) and bool(value == other)


def _explain(error: msgspec.ValidationError) -> tuple[str, str | None]:
    """msgspec's "Expected `int`, got `str` - at `$.max_tokens`" as a message and the field's name."""
    message, _, path = str(error).partition(" - at ")
    where = re.search(r"`\$\.?([^`]*)`", path)
    param = where[1] if where and where[1] else None
    missing = re.fullmatch(r"Object missing required field `(\w+)`", message)
    if missing:
        param = f"{param}.{missing[1]}" if param else missing[1]
        return f"{param} is missing", param
    return (f"{param}: {message[0].lower()}{message[1:]}" if param else message), param


def _check_combinations(request: ChatRequest) -> None:
    """What no field can say alone."""
    both = (request.max_tokens, request.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise ApiError(
            400, "max_tokens and max_completion_tokens differ; send only max_completion_tokens", param="max_tokens"
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
