"""What comes before every route: is this for us, from someone who may ask, in a form that no web page can send?

A browser on this host, or on its network, runs other people's pages. One whose name suddenly resolves to our address
(DNS rebinding) still sends that name as Host. Others may send here without asking what a form can send (CSRF), and
that is no JSON; everything else a browser first asks for (a CORS preflight), and it says from where it comes. Programs
say nothing of the kind, and need the key where there is one.
"""

from __future__ import annotations

import logging
import traceback

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from potluck.http.access import Access
from potluck.http.errors import ApiError
from potluck.http.json_body import require_json

HAS_KEY = "potluck.has_key"
"""In a request's scope: whether it came with the key, or none is needed."""

_OPEN_TO_READ = ("/", "/health")
_OPEN_FOLDER = "/page/"
_METHODS = "GET, POST"
# h11 only bounds a head that comes in pieces.
_MAX_HEAD_BYTES = 32 * 2**10
_MAX_HEADERS = 100
_PREFLIGHT_S = "600"
# Each says from where or with what right a request comes: two of one say two things.
_ONCE = ("host", "origin", "authorization", "x-api-key", "content-type", "sec-fetch-site")


log = logging.getLogger("potluck.http")


class Gate:
    """ASGI middleware around everything. Refuses with an ApiError's answer; the application never sees the request."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        send = _kept_by_nobody(send)
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
            send = _sender_for(origin, send)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _preflight(headers)(scope, receive, send)
                return
        try:
            scope[HAS_KEY] = self._has_key(headers)
            _check_form(scope, headers)
            if not scope[HAS_KEY] and not _is_open(scope):
                raise _no_key()
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except Exception as error:  # noqa: BLE001 - whoever asked has been answered, as far as that went
            # What it says may be of the prompt, which belongs into no log.
            log.error("a request failed with %s", _where(error))

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        size = (
            len(scope["raw_path"])
            + len(scope["query_string"])
            + sum(len(name) + len(value) for name, value in headers.raw)
        )
        if size > _MAX_HEAD_BYTES or len(headers.raw) > _MAX_HEADERS:
            raise ApiError(431, "the request's head is too large", code="bad_header")
        for name in _ONCE:
            if len(headers.getlist(name)) > 1:
                raise ApiError(400, f"more than one {name} header", code="bad_header")
        if "transfer-encoding" in headers and "content-length" in headers:
            raise ApiError(400, "a body's length is said in two ways", code="bad_header")
        host = headers.get("host", "")
        server = scope.get("server")
        if not self._access.knows_host(host, server[0] if server else None):
            raise ApiError(
                403,
                f"the host {host[:100]!r} is not served here; use localhost, or name it with potluck up --allow-host",
                code="host_not_allowed",
            )
        # "GET http://elsewhere/ HTTP/1.1": a proxy's form, with a second name.
        if not scope["path"].startswith("/"):
            raise ApiError(400, "the request's target must be a path", code="bad_target")

    def _check_origin(self, scope: Scope, headers: Headers) -> str | None:
        """The origin of a page elsewhere that may ask; None for our own and for programs. Raises ApiError 403."""
        origin = headers.get("origin")
        if origin is not None and origin in self._access.origins:
            return origin
        site = headers.get("sec-fetch-site", "none")
        is_own = origin is None or origin == f"http://{headers['host'].lower()}"
        if is_own and (site in ("same-origin", "none") or _is_link(scope, headers)):
            return None
        where = repr(origin[:100]) if origin is not None else "another site"
        raise ApiError(
            403,
            f"pages of {where} may not ask here; if they should: potluck up --allow-origin ORIGIN",
            code="origin_not_allowed",
        )

    def _has_key(self, headers: Headers) -> bool:
        key = self._access.key
        if key is None:
            return True
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        presented = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return key.is_right(presented.encode("latin-1", "replace"))


def _check_form(scope: Scope, headers: Headers) -> None:
    """Raises ApiError: 400 for what wants another protocol, 415 for a POST that is not JSON."""
    if "websocket" in headers.get("upgrade", "").lower():
        raise ApiError(400, "there are no web sockets here", code="no_web_sockets")
    if scope["method"] in ("POST", "PUT", "PATCH"):
        require_json(headers.get("content-type", ""))


def _is_open(scope: Scope) -> bool:
    path: str = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in _OPEN_TO_READ or path.startswith(_OPEN_FOLDER))


def _is_link(scope: Scope, headers: Headers) -> bool:
    """Someone followed a link to the chat page, which shows nothing by itself."""
    is_visit = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
    return is_visit and scope["method"] == "GET" and scope["path"] == "/" and headers.get("origin") is None


def _no_key() -> ApiError:
    # One answer, whatever is wrong with the key.
    return ApiError(
        401,
        "this endpoint needs its API key as a bearer token; its owner sees it with: potluck key",
        code="invalid_api_key",
    )


def _preflight(headers: Headers) -> Response:
    allowed = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Max-Age": _PREFLIGHT_S}
    if asked := headers.get("access-control-request-headers"):
        allowed["Access-Control-Allow-Headers"] = asked
    if headers.get("access-control-request-private-network") == "true":
        allowed["Access-Control-Allow-Private-Network"] = "true"
    return Response(status_code=204, headers=allowed)


def _where(error: BaseException) -> str:
    """The kind of an error, and of those in it, and the lines of ours that led to it."""
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else (error.__cause__,)
    parts = [_where(one) for one in inner if one is not None]
    return "\n".join([type(error).__name__, "".join(traceback.format_tb(error.__traceback__)), *parts])


def _kept_by_nobody(send: Send) -> Send:
    """Answers are for who asked, and are what they say: no cache keeps them, no browser guesses another kind."""

    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.setdefault("Cache-Control", "no-store")
            headers.setdefault("X-Content-Type-Options", "nosniff")
        await send(message)

    return sender


def _sender_for(origin: str, send: Send) -> Send:
    """Lets pages of `origin` read what is answered. Never with credentials: there are no cookies here."""

    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = "Retry-After"
            headers.add_vary_header("Origin")
        await send(message)

    return sender
