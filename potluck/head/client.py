"""A client for commands: it sends a request to the running head of this host, over its endpoint."""

from __future__ import annotations

from typing import Any, TypeVar

import httpx
import msgspec

from potluck.api.api_key import SECRET_HEADER, read_key
from potluck.host.local_head import LocalHead, running_head
from transport.errors import NotRunning, error_from_code

_TIMEOUT_S = 10.0

Answer = TypeVar("Answer")


class _Error(msgspec.Struct, frozen=True):
    message: str
    code: str | None = None


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _Error


def auth_headers() -> dict[str, str]:
    """What this user's programs send to the head of this host to be answered. Raises ConfigError."""
    key = read_key()
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def control_headers(head: LocalHead) -> dict[str, str]:
    """What this user's commands send to the head of this host to be obeyed. Raises ConfigError."""
    return {**auth_headers(), SECRET_HEADER: head.secret}


def key_for_url(url: str) -> str:
    """The key, if this user's head answers at `url`; "" for everybody else's endpoint: they must not learn it."""
    try:
        is_ours = running_head().url == url.rstrip("/").removesuffix("/v1")
    except NotRunning:
        return ""
    return (read_key() or "") if is_ours else ""


def get_from_head(path: str, reply_type: type[Answer], *, timeout_s: float = _TIMEOUT_S) -> Answer:
    """The head's answer to GET `path`. Raises NotRunning, and the error that the head answers with."""
    return _request("GET", path, None, reply_type, timeout_s)


def post_to_head(path: str, body: dict[str, Any], reply_type: type[Answer], *, timeout_s: float = _TIMEOUT_S) -> Answer:
    """The head's answer to POST `body`. Raises NotRunning, and the error that the head answers with."""
    return _request("POST", path, body, reply_type, timeout_s)


def _request(method: str, path: str, body: dict[str, Any] | None, reply_type: type[Answer], timeout_s: float) -> Answer:
    head = running_head()
    try:
        response = httpx.request(
            method, f"{head.url}{path}", json=body, headers=control_headers(head), timeout=timeout_s, trust_env=False
        )
        if response.is_success:
            return msgspec.json.decode(response.content, type=reply_type)
        error = msgspec.json.decode(response.content, type=_ErrorBody).error
    except (httpx.HTTPError, msgspec.DecodeError, UnicodeDecodeError) as problem:
        raise _not_answering(head, problem) from problem
    message, _, hint = error.message.partition("; ")
    raise error_from_code(error.code or "", message, hint)


def _not_answering(head: LocalHead, problem: Exception) -> NotRunning:
    return NotRunning(
        f"the head (process {head.pid}) does not answer at {head.url}: {problem}", hint="is it still starting?"
    )
