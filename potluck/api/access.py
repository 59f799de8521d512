"""The access policy says who may use the API; its middleware checks host, origin and key before every route."""

from __future__ import annotations

import logging
import re
import traceback
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Protocol
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from potluck.api.errors import ApiError
from potluck.api.json_body import require_json

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
_HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,253})(?::([0-9]{1,5}))?", re.ASCII)
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*", re.ASCII)
_MAX_NAME_CHARS = 253


class KeyCheck(Protocol):
    def is_right(self, presented: bytes) -> bool:
        """Takes as long for a wrong key as for the right one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessPolicy:
    """`hosts` are names and addresses as a Host header has them, in lower case, without the port, which is `port`.
    `origins` are those of pages elsewhere that may use the API. `key` None: none is needed."""

    port: int
    hosts: frozenset[str] = LOOPBACK_HOSTS
    origins: frozenset[str] = frozenset()
    key: KeyCheck | None = None

    def allows_host(self, host: str, local_address: str | None) -> bool:
        """Whether a Host header names this endpoint. `local_address` is where the connection came in: a page that
        renames itself (DNS rebinding) has a name, never an address that it is not at."""
        found = _HOST.fullmatch(host.lower())
        if found is None or found[2] not in (None, str(self.port)):
            return False
        return found[1] in self.hosts or (local_address is not None and found[1] == url_host(local_address))


def url_host(address: str) -> str:
    """An IP address as it stands in a URL; one of IPv4 that a socket of IPv6 reports stays one of IPv4."""
    plain = address.partition("%")[0].lower()
    mapped = ip_address(plain).ipv4_mapped if ":" in plain else None  # type: ignore[union-attr]
    if mapped is not None:
        return str(mapped)
    return f"[{plain}]" if ":" in plain else plain


def parse_host(text: str) -> str | None:
    """A name or an address that a user allows, as a Host header has it; None if it is neither."""
    plain = text.strip().lower().removeprefix("[").removesuffix("]")
    try:
        address = ip_address(plain)
    except ValueError:
        return plain if len(plain) <= _MAX_NAME_CHARS and _NAME.fullmatch(plain) else None
    return None if address.is_unspecified else url_host(str(address))


def parse_origin(text: str) -> str | None:
    """An origin that a user allows ("https://chat.example:8443"), as an Origin header has it; None if it is none."""
    try:
        parts = urlsplit(text.strip().lower())
        port = parts.port
    except ValueError:
        return None
    host = parse_host(parts.hostname or "")
    has_more = parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc
    if parts.scheme not in ("http", "https") or host is None or has_more:
        return None
    is_default = port is None or port == {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{host}" if is_default else f"{parts.scheme}://{host}:{port}"


HAS_KEY = "potluck.has_key"
"""In a request's scope: whether it came with the key, or none is needed."""

_PUBLIC_PATHS = ("/", "/health")
_PUBLIC_FOLDER = "/page/"
_METHODS = "GET, POST"
# h11 only bounds a head that comes in several parts.
_MAX_HEADER_BYTES = 32 * 2**10
_MAX_HEADERS = 100
_PREFLIGHT_S = "600"
# Each says from where or with what right a request comes: two of one say two things.
_SINGLE_HEADERS = ("host", "origin", "authorization", "x-api-key", "content-type", "sec-fetch-site")


log = logging.getLogger("potluck.api")


class AccessMiddleware:
    """ASGI middleware around everything. Refuses with an ApiError's answer; the application never sees the request."""

    def __init__(self, app: ASGIApp, access: AccessPolicy) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        send = _with_no_store(send)
        try:
            self._check_host(scope, headers)
            origin = self._check_origin(scope, headers)
        except ApiError as error:
            response = error.response()
            if error.code == "bad_header":
                # Whoever stands between may take what follows for something else than we do.
                response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        if origin is not None:
            send = _with_cors(origin, send)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _preflight(headers)(scope, receive, send)
                return
        try:
            scope[HAS_KEY] = self._has_key(headers)
            _check_content_type(scope, headers)
            if not scope[HAS_KEY] and not _is_public(scope):
                raise _unauthorized()
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except Exception as error:  # noqa: BLE001 - the client has been answered, as far as that went
            # What it says may be of the prompt, which belongs into no log.
            log.error("a request failed with %s", _error_trace(error))

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        size = (
            len(scope["raw_path"])
            + len(scope["query_string"])
            + sum(len(name) + len(value) for name, value in headers.raw)
        )
        if size > _MAX_HEADER_BYTES or len(headers.raw) > _MAX_HEADERS:
            most = f"{_MAX_HEADERS} headers of {_MAX_HEADER_BYTES // 1024} KiB"
            raise ApiError(
                431, f"expected at most {most}, got {len(headers.raw)} of {size:,} bytes; send less", code="bad_header"
            )
        for name in _SINGLE_HEADERS:
            if (count := len(headers.getlist(name))) > 1:
                raise ApiError(400, f"expected one {name} header, got {count}; send it once", code="bad_header")
        if "transfer-encoding" in headers and "content-length" in headers:
            raise ApiError(
                400, "expected content-length or transfer-encoding, got both; send one of them", code="bad_header"
            )
        host = headers.get("host", "")
        server = scope.get("server")
        if not self._access.allows_host(host, server[0] if server else None):
            raise ApiError(
                403,
                f"the host {host[:100]!r} is not served here; use localhost, or name it with potluck up --allow-host",
                code="host_not_allowed",
            )
        # "GET http://elsewhere/ HTTP/1.1": a proxy's form, with a second name.
        if not scope["path"].startswith("/"):
            raise ApiError(
                400, f"expected a path as target, got {scope['path'][:100]!r}; send GET /v1/models", code="bad_target"
            )

    def _check_origin(self, scope: Scope, headers: Headers) -> str | None:
        """The origin of a page elsewhere that is allowed; None for our own and for programs. Raises ApiError 403."""
        origin = headers.get("origin")
        if origin is not None and origin in self._access.origins:
            return origin
        site = headers.get("sec-fetch-site", "none")
        is_own = origin is None or origin == f"http://{headers['host'].lower()}"
        if is_own and (site in ("same-origin", "none") or _is_page_navigation(scope, headers)):
            return None
        where = repr(origin[:100]) if origin is not None else "another site"
        raise ApiError(
            403,
            f"pages of {where} may not use this endpoint; to allow them: potluck up --allow-origin ORIGIN",
            code="origin_not_allowed",
        )

    def _has_key(self, headers: Headers) -> bool:
        key = self._access.key
        if key is None:
            return True
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        presented = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return key.is_right(presented.encode("latin-1", "replace"))


def _check_content_type(scope: Scope, headers: Headers) -> None:
    """Raises ApiError: 400 for what wants another protocol, 415 for a POST that is not JSON."""
    if "websocket" in headers.get("upgrade", "").lower():
        raise ApiError(400, "expected HTTP, got a web socket; POST with stream set to true", code="no_web_sockets")
    if scope["method"] in ("POST", "PUT", "PATCH"):
        require_json(headers.get("content-type", ""))


def _is_public(scope: Scope) -> bool:
    path: str = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in _PUBLIC_PATHS or path.startswith(_PUBLIC_FOLDER))


def _is_page_navigation(scope: Scope, headers: Headers) -> bool:
    """Someone followed a link to the chat page, which shows nothing by itself."""
    is_visit = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
    return is_visit and scope["method"] == "GET" and scope["path"] == "/" and headers.get("origin") is None


def _unauthorized() -> ApiError:
    # One answer, whatever is wrong with the key.
    return ApiError(
        401,
        "this endpoint needs its API key as a bearer token; its owner sees it with: potluck key",
        code="invalid_api_key",
    )


def _preflight(headers: Headers) -> Response:
    allowed = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Max-Age": _PREFLIGHT_S}
    if requested := headers.get("access-control-request-headers"):
        allowed["Access-Control-Allow-Headers"] = requested
    if headers.get("access-control-request-private-network") == "true":
        allowed["Access-Control-Allow-Private-Network"] = "true"
    return Response(status_code=204, headers=allowed)


def _error_trace(error: BaseException) -> str:
    """The kind of an error, and of those in it, and the lines of ours that led to it."""
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else (error.__cause__,)
    parts = [_error_trace(one) for one in inner if one is not None]
    return "\n".join([type(error).__name__, "".join(traceback.format_tb(error.__traceback__)), *parts])


def _with_no_store(send: Send) -> Send:
    """No cache keeps answers, and no browser guesses another media type."""

    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.setdefault("Cache-Control", "no-store")
            headers.setdefault("X-Content-Type-Options", "nosniff")
        await send(message)

    return sender


def _with_cors(origin: str, send: Send) -> Send:
    """Lets pages of `origin` read what is answered. Never with credentials: there are no cookies here."""

    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = "Retry-After"
            headers.add_vary_header("Origin")
        await send(message)

    return sender
