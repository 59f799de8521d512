"""An endpoint answers streamed chats, which are read into arrivals of tokens, usage and errors."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from potluck.head.client import key_for_url
from potluck.measure.http_client import HttpExchange, HttpPeer, run_exchange
from transport.errors import ConfigError, NotRunning, PotluckError


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """Text that came at one moment, and how many tokens it is taken for."""

    at_s: float
    text: str
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedAnswer:
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


def answer_of(exchange: HttpExchange) -> StreamedAnswer:
    """Also of an exchange that was cut off: what had come until then."""
    reader = exchange.reader
    if reader.status is None:
        return StreamedAnswer(status=None, error=exchange.error or "no answer")
    if reader.status != 200:
        return StreamedAnswer(status=reader.status, error=f"{reader.status}: {error_text(bytes(reader.body))}")
    return _streamed(exchange)


def _streamed(exchange: HttpExchange) -> StreamedAnswer:
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
    return StreamedAnswer(
        status=200,
        error=error,
        arrivals=arrivals,
        tokens=tokens,
        prompt_tokens=_count(usage, "prompt_tokens"),
        cached_tokens=_count(details, "cached_tokens") if isinstance(details, Mapping) else None,
        has_usage=counted is not None,
    )


def _events(exchange: HttpExchange) -> Iterator[tuple[float, str]]:
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


_FACTS_WITHIN_S = 15.0
_IGNORES_EOS = frozenset({"llamacpp", "vllm", "sglang"})
_REFUSED = (429, 503)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadEndpoint:
    """`fields` go into every request beside the messages; `owner` is what the list of models says ("vllm")."""

    url: str
    peer: HttpPeer
    path: str
    headers: Mapping[str, str]
    model: str
    owner: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_potluck(self) -> bool:
        return self.owner == "potluck"

    async def chat(
        self, messages: Sequence[Mapping[str, str]], output: int, found: HttpExchange, *, silence_s: float
    ) -> None:
        """An answer of `output` tokens, streamed into `found`."""
        body = {"model": self.model, "messages": messages, "max_tokens": output, "temperature": 0, "stream": True}
        request = self.peer.request(
            "POST", f"{self.path}/v1/chat/completions", self.headers, json.dumps({**body, **self.fields}).encode()
        )
        await run_exchange(self.peer, request, found, silence_s=silence_s)

    async def status(self) -> dict[str, Any] | None:
        """What a Potluck head says of its stages; None from others, and where it says nothing."""
        if not self.is_potluck:
            return None
        found = await _get(self, "/potluck/status")
        if found.reader.status != 200:
            return None
        try:
            report = json.loads(found.reader.body)
        except ValueError:
            return None
        return report if isinstance(report, dict) and report.get("stages") else None


async def find_endpoint(url: str, *, model: str | None, key: str) -> LoadEndpoint:
    """The endpoint at `url` (with or without /v1) that serves `model`, or the first of its models. This user's own head
    needs no `key`. Raises ConfigError or NotRunning."""
    endpoint = _addressed(url, key or key_for_url(url))
    found = await _get(endpoint, "/v1/models")
    status = found.reader.status
    if status is None:
        raise NotRunning(f"{url}: {found.error}", hint="is the server up, and is this its address?")
    if status in (401, 403):
        raise _no_access(url, status, key)
    if status != 200 and model is not None:
        return replace(endpoint, model=model)
    if status != 200:
        raise ConfigError(
            f"{url}/v1/models says {status}: {error_text(bytes(found.reader.body))}",
            hint="give the address that /v1/chat/completions is under, or name the model with --model",
        )
    names = _models(url, bytes(found.reader.body))
    if not names and model is None:
        raise ConfigError(f"{url} serves no model", hint="load one there, or name it with --model")
    if model is not None and names and model not in names:
        raise ConfigError(f"{url} does not serve {model}", hint=f"--model is one of: {', '.join(list(names)[:8])}")
    chosen = model or next(iter(names))
    return replace(endpoint, model=chosen, owner=names.get(chosen, ""))


async def prepare_endpoint(
    endpoint: LoadEndpoint, eos_ids: Sequence[int], *, silence_s: float
) -> tuple[LoadEndpoint, StreamedAnswer]:
    """The endpoint with the fields that it takes: usage in the stream, and no end before the length that is asked for.
    `eos_ids` are its tokenizer's, none if unknown. Raises ConfigError or NotRunning if it can't answer one word."""
    fields: dict[str, Any] = {"stream_options": {"include_usage": True}}
    if endpoint.owner in _IGNORES_EOS:
        fields["ignore_eos"] = True
    elif eos_ids:
        fields["logit_bias"] = {str(token_id): -100 for token_id in eos_ids}
    while True:
        tried = replace(endpoint, fields=fields)
        answer = await chat_once(tried, "Hello", 2, silence_s=silence_s)
        if not answer.error or (answer.status == 200 and answer.has_usage):
            return tried, answer
        unknown = next((name for name in fields if name in answer.error), None)
        if answer.status not in (400, 422) or unknown is None:
            raise _can_not_answer(tried, answer)
        del fields[unknown]


async def chat_once(endpoint: LoadEndpoint, text: str, output: int, *, silence_s: float) -> StreamedAnswer:
    found = HttpExchange()
    await endpoint.chat([{"role": "user", "content": text}], output, found, silence_s=silence_s)
    return answer_of(found)


def _can_not_answer(endpoint: LoadEndpoint, answer: StreamedAnswer) -> PotluckError:
    if answer.status in (401, 403):
        return _no_access(endpoint.url, answer.status, endpoint.headers.get("Authorization", ""))
    what = f"{endpoint.url} does not answer a chat with {endpoint.model}: {answer.error}"
    if answer.status is None:
        return NotRunning(what, hint="is the server well? --timeout is how long it may be silent")
    if answer.status in _REFUSED:
        return NotRunning(what, hint="try again when it has loaded its model, or is less busy")
    return ConfigError(what, hint="check the address and --model; the endpoint needs streamed /v1/chat/completions")


def _no_access(url: str, status: int, key: str) -> ConfigError:
    if key:
        return ConfigError(f"{url} refuses the key in OPENAI_API_KEY ({status})", hint="set one that it knows")
    return ConfigError(f"{url} wants an API key ({status})", hint="set it in the environment: OPENAI_API_KEY")


def _models(url: str, body: bytes) -> dict[str, str]:
    """Names and owners. Raises ConfigError."""
    try:
        return {str(each["id"]): str(each.get("owned_by", "")) for each in json.loads(body)["data"]}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{url}/v1/models is not a list of models: {error_text(body)[:120]}",
            hint="is an OpenAI-compatible server there?",
        ) from error


def _addressed(url: str, key: str) -> LoadEndpoint:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        port = 0
    host = parts.hostname
    if parts.scheme not in ("http", "https") or not host or not port or parts.query or parts.username:
        raise ConfigError(f"{url} is not an endpoint's address", hint="like http://127.0.0.1:8080")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("OPENAI_API_KEY is not a key: it has characters that no key has", hint="set it again")
    try:
        address = str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise NotRunning(f"{host}: {error.strerror or error}", hint="check the address") from error
    context = ssl.create_default_context() if parts.scheme == "https" else None
    return LoadEndpoint(
        url=url.rstrip("/").removesuffix("/v1"),
        peer=HttpPeer(address=address, port=port, name=host, context=context),
        path=parts.path.rstrip("/").removesuffix("/v1"),
        headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})},
        model="",
    )


async def _get(endpoint: LoadEndpoint, path: str) -> HttpExchange:
    found = HttpExchange()
    request = endpoint.peer.request("GET", f"{endpoint.path}{path}", endpoint.headers)
    await run_exchange(endpoint.peer, request, found, silence_s=_FACTS_WITHIN_S)
    return found
