"""The body reader reads and decodes a request's JSON within bounds of bytes, depth and number of values."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
from starlette.requests import Request

from potluck.api.errors import ApiError
from transport.errors import Busy

MAX_BODY_BYTES = 8 * 2**20
MAX_BUFFERED_BYTES = 64 * 2**20
# A chat of any usual length is read however many long ones are coming in.
_SMALL_BYTES = 64 * 2**10
MAX_DEPTH = 64
# An empty list takes 3 bytes as text and 64 in memory.
MAX_CONTAINERS = 20_000
MAX_ITEMS = 200_000

# A complete string, so that what stands in it does not count, or one mark.
_TEXT_OR_MARK = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{},]', re.DOTALL)


class BodyReader:
    """Reads bodies; those under way hold at most `limit_bytes` together, beside the beginning of each."""

    def __init__(self, limit_bytes: int = MAX_BUFFERED_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._buffered_bytes = 0

    async def read(self, request: Request) -> bytes:
        """Raises ApiError: 415 for what is not JSON, 413, and 429 while others hold what there is."""
        require_json(request.headers.get("content-type", ""))
        too_large = ApiError(
            413,
            f"expected a body of at most {MAX_BODY_BYTES // 2**20} MiB, got more; send fewer or shorter messages",
            code="body_too_large",
        )
        length = request.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > MAX_BODY_BYTES):
            raise too_large
        body = bytearray()
        counted_bytes = 0
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
                grown_bytes = max(len(body) - _SMALL_BYTES, 0) - counted_bytes
                if grown_bytes and self._buffered_bytes + grown_bytes > self._limit_bytes:
                    raise ApiError.from_error(Busy("too many long requests are coming in", hint="try again soon"))
                self._buffered_bytes += grown_bytes
                counted_bytes += grown_bytes
        finally:
            self._buffered_bytes -= counted_bytes
        return bytes(body)


def require_json(content_type: str) -> None:
    """Raises ApiError 415: other content types would let any web page post here without a preflight."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"expected the content type application/json, got {kind[:100] or 'none'}; set that header")


def decode_object(body: bytes) -> dict[str, Any]:
    """A JSON object, its values plain. Raises ApiError (400), also for a name that stands twice in an object, and for
    NaN, which is no JSON."""
    _check_shape(body)
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(fields).__name__}")
    # Parsers differ in which of two they take, and msgspec does not say that there were two.
    json.loads(body, object_pairs_hook=_refuse_duplicate_names, parse_int=_ignore_number, parse_float=_ignore_number)
    return fields


def _check_shape(body: bytes) -> None:
    """Raises ApiError (400) for more depth or more values than any request needs, before they are made."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH and body.count(b",") <= MAX_ITEMS:
        return
    depth = num_containers = num_items = 0
    for match in _TEXT_OR_MARK.finditer(body):
        mark = match[0]
        if mark in (b"[", b"{"):
            depth += 1
            num_containers += 1
        elif mark in (b"]", b"}"):
            depth -= 1
        else:
            # A comma or a text.
            num_items += 1
        if depth > MAX_DEPTH:
            raise ApiError(
                400,
                f"expected at most {MAX_DEPTH} levels of nesting, got more",
                code="too_complex",
            )
        if num_containers > MAX_CONTAINERS or num_items > MAX_ITEMS:
            most = f"{MAX_CONTAINERS} lists and objects, and {MAX_ITEMS} values"
            raise ApiError(400, f"expected at most {most}, got more; send a smaller body", code="too_complex")


def _refuse_duplicate_names(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for name, _ in pairs:
        if name in seen:
            raise ApiError(400, f"the field {name[:100]} stands twice in one object; send it once", param=name)
        seen.add(name)


def _ignore_number(text: str) -> None:
    # Python refuses to read numbers of some thousand digits; msgspec has read these already.
    return None
