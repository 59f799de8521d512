"""An OpenAI-compatible endpoint to put under load: found, asked what it is, and tried before anything is measured."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from bench.load_answer import Answer, answer_of, error_text
from bench.load_http import Exchange, Peer, exchange
from potluck.api_key import key_at
from transport.errors import ConfigError, NotRunning, PotluckError

_FACTS_WITHIN_S = 15.0
_IGNORES_EOS = frozenset({"llamacpp", "vllm", "sglang"})
_REFUSED = (429, 503)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """`fields` go into every request beside the messages; `owner` is what the list of models says ("vllm")."""

    url: str
    peer: Peer
    path: str
    headers: Mapping[str, str]
    model: str
    owner: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_potluck(self) -> bool:
        return self.owner == "potluck"

    async def chat(
        self, messages: Sequence[Mapping[str, str]], output: int, found: Exchange, *, silence_s: float
    ) -> None:
        """An answer of `output` tokens, streamed into `found`."""
        body = {"model": self.model, "messages": messages, "max_tokens": output, "temperature": 0, "stream": True}
        request = self.peer.request(
            "POST", f"{self.path}/v1/chat/completions", self.headers, json.dumps({**body, **self.fields}).encode()
        )
        await exchange(self.peer, request, found, silence_s=silence_s)

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


async def find_endpoint(url: str, *, model: str | None, key: str) -> Endpoint:
    """The endpoint at `url` (with or without /v1) that serves `model`, or the first of its models. This user's own head
    needs no `key`. Raises ConfigError or NotRunning."""
    endpoint = _addressed(url, key or key_at(url))
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


async def prepare(endpoint: Endpoint, eos_ids: Sequence[int], *, silence_s: float) -> tuple[Endpoint, Answer]:
    """The endpoint with the fields that it takes: usage in the stream, and no end before the length that is asked for.
    `eos_ids` are its tokenizer's, none if unknown. Raises ConfigError or NotRunning if it can't answer one word."""
    fields: dict[str, Any] = {"stream_options": {"include_usage": True}}
    if endpoint.owner in _IGNORES_EOS:
        fields["ignore_eos"] = True
    elif eos_ids:
        fields["logit_bias"] = {str(token_id): -100 for token_id in eos_ids}
    while True:
        tried = replace(endpoint, fields=fields)
        answer = await ask(tried, "Hello", 2, silence_s=silence_s)
        if not answer.error or (answer.status == 200 and answer.has_usage):
            return tried, answer
        unknown = next((name for name in fields if name in answer.error), None)
        if answer.status not in (400, 422) or unknown is None:
            raise _can_not_answer(tried, answer)
        del fields[unknown]


async def ask(endpoint: Endpoint, text: str, output: int, *, silence_s: float) -> Answer:
    found = Exchange()
    await endpoint.chat([{"role": "user", "content": text}], output, found, silence_s=silence_s)
    return answer_of(found)


def _can_not_answer(endpoint: Endpoint, answer: Answer) -> PotluckError:
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


def _addressed(url: str, key: str) -> Endpoint:
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
    return Endpoint(
        url=url.rstrip("/").removesuffix("/v1"),
        peer=Peer(address=address, port=port, name=host, context=context),
        path=parts.path.rstrip("/").removesuffix("/v1"),
        headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})},
        model="",
    )


async def _get(endpoint: Endpoint, path: str) -> Exchange:
    found = Exchange()
    request = endpoint.peer.request("GET", f"{endpoint.path}{path}", endpoint.headers)
    await exchange(endpoint.peer, request, found, silence_s=_FACTS_WITHIN_S)
    return found
