"""Commands that ask the running head of this host for something, over its endpoint."""

from __future__ import annotations

from typing import Any, TypeVar

import httpx
import msgspec

from potluck.api_key import command_headers
from potluck.head_file import HeadFacts, running_head
from transport.errors import NotRunning, error_from_code

_TIMEOUT_S = 10.0

Answer = TypeVar("Answer")


class _Error(msgspec.Struct, frozen=True):
    message: str
    code: str | None = None


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _Error


def get_from_head(path: str, answer: type[Answer], *, timeout_s: float = _TIMEOUT_S) -> Answer:
    """What the head says at `path`. Raises NotRunning, and the error that the head answers with."""
    return _ask("GET", path, None, answer, timeout_s)


def post_to_head(path: str, body: dict[str, Any], answer: type[Answer], *, timeout_s: float = _TIMEOUT_S) -> Answer:
    """What the head answers to `body`. Raises NotRunning, and the error that the head answers with."""
    return _ask("POST", path, body, answer, timeout_s)


def _ask(method: str, path: str, body: dict[str, Any] | None, answer: type[Answer], timeout_s: float) -> Answer:
    head = running_head()
    try:
        response = httpx.request(
            method, f"{head.url}{path}", json=body, headers=command_headers(head), timeout=timeout_s, trust_env=False
        )
        if response.is_success:
            return msgspec.json.decode(response.content, type=answer)
        error = msgspec.json.decode(response.content, type=_ErrorBody).error
    except (httpx.HTTPError, msgspec.DecodeError, UnicodeDecodeError) as problem:
        raise _silent(head, problem) from problem
    message, _, hint = error.message.partition("; ")
    raise error_from_code(error.code or "", message, hint)


def _silent(head: HeadFacts, problem: Exception) -> NotRunning:
    return NotRunning(
        f"the head (process {head.pid}) does not answer at {head.url}: {problem}", hint="is it still starting?"
    )
