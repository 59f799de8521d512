"""The HTTP server puts the routes, the chat page and uvicorn's settings together."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from potluck.api.access import HAS_KEY, AccessMiddleware, AccessPolicy
from potluck.api.errors import ApiError, json_response, model_not_found
from potluck.api.limits import ConcurrencyLimit, ConnectionLimiter, LimitedConnection
from potluck.api.openai.chat import ChatCompletions, ChatEngine

_PAGE = Path(__file__).parent / "page"
# Not the system's own table, which on Windows may say anything of .js.
_MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(engine: ChatEngine, *, model: str) -> Starlette:
    """Serves one model by its name. Whether it can answer is the engine's state at each request."""
    created = int(time.time())
    card = {"id": model, "object": "model", "created": created, "owned_by": "potluck"}

    async def list_models(request: Request) -> Response:
        return json_response({"object": "list", "data": [card]})

    async def show_model(request: Request) -> Response:
        requested = request.path_params["model"]
        if requested != model:
            raise model_not_found(requested, model)
        return json_response(card)

    async def health(request: Request) -> Response:
        state = engine.state
        body: dict[str, str] = {"status": state}
        # What is wrong may name paths and devices: not for everyone.
        if request.scope.get(HAS_KEY, True):
            body["model"] = model
            if state != "ready":
                body["reason"] = engine.reason
        return json_response(body, 200 if state == "ready" else 503)

    # Read once: who has no key makes no work for the disk, and a name is looked up, never made a path.
    files = {path.name: path.read_bytes() for path in _PAGE.iterdir()}

    async def page(request: Request) -> Response:
        return _page_file("index.html", files["index.html"])

    async def page_file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in files:
            raise HTTPException(404)
        return _page_file(name, files[name])

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", ChatCompletions(engine, model).__call__, methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/v1/models/{model:path}", show_model),
            Route("/health", health),
            Route("/", page),
            Route("/page/{name}", page_file),
        ],
        middleware=[Middleware(ConcurrencyLimit)],
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error, Exception: _on_unexpected_error},
    )
    # A path with a slash too many is another path, also for who may ask.
    app.router.redirect_slashes = False
    return app


def _page_file(name: str, data: bytes) -> Response:
    return Response(data, media_type=_MEDIA_TYPES[Path(name).suffix], headers=_PAGE_HEADERS)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow", "GET")
    what = {
        404: "no such path; use /v1/chat/completions, /v1/models or /health",
        405: f"expected {allowed}, got {request.method}",
    }
    message = f"{request.url.path}: {what.get(error.status_code, error.detail)}"
    response = ApiError(error.status_code, message, code="not_found").response()
    response.headers.update(error.headers or {})
    return response


async def _on_unexpected_error(request: Request, error: Exception) -> Response:
    # Starlette raises it again after this, for the log; the client is not shown our insides.
    return ApiError(500, "Potluck failed at this request; see its log", code="internal_error").response()


def make_server(app: ASGIApp, access: AccessPolicy) -> uvicorn.Server:
    config = uvicorn.Config(
        AccessMiddleware(app, access),
        # Called with keywords, as a class is.
        http=cast(Any, partial(LimitedConnection, limiter=ConnectionLimiter())),
        ws="none",
        # A client could name any address as its own.
        proxy_headers=False,
        log_config=None,
        # Each odd request would be a line, and there is no end of them.
        log_level="error",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    return uvicorn.Server(config)
