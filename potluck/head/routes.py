"""What the head's own commands ask it: its status, a better plan, an invite, and whether a host may come in.

Whoever may chat may see the status. The rest is for the head's own user: being given the API key, or an account on the
head's computer, lets nobody decide who is in the pool. What shows it is the secret in the head's file.
"""

from __future__ import annotations

import asyncio
import hmac
from typing import Protocol, TypeVar

import msgspec
from msgspec import Struct
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from potluck.api.api_key import SECRET_HEADER
from potluck.api.errors import ApiError, json_response
from potluck.head.models.search import FileHolders, RemoteModelList
from potluck.head.plan_watch import BetterPlan
from potluck.head.status import StatusReport, better_report
from transport.errors import NotAllowed, PotluckError
from transport.timeouts import CODE_LIFETIME_S, INVITE_LIFETIME_S

_MAX_BODY_BYTES = 4096
_BODY_TIMEOUT_S = 5.0
Body = TypeVar("Body")


class HeadControl(Protocol):
    """What the routes ask; all of it thread-safe."""

    def report(self) -> StatusReport: ...

    def request_replan(self) -> BetterPlan | None: ...

    def invite(self) -> tuple[str, str]:
        """A fresh invite and a fresh code. Raises NotRunning without a network."""

    def decide_candidate(self, name: str, allow: bool) -> str:
        """Let in, or refuse, the host that waits under that name; its name. Raises BadRequest, NotRunning."""

    def find_file(self, sha256: str) -> FileHolders:
        """Which other hosts have a file with that checksum, and give it from now on."""

    def list_models(self) -> RemoteModelList:
        """What the other hosts have in their stores."""


class FileQuery(Struct, frozen=True, forbid_unknown_fields=True):
    sha256: str


class CandidateDecision(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    allow: bool


def head_routes(head: HeadControl, secret: str) -> list[Route]:
    """`secret` is what requests have to show that change something."""

    def check(request: Request) -> None:
        shown = request.headers.get(SECRET_HEADER, "")
        if not hmac.compare_digest(shown.encode(), secret.encode()):
            raise ApiError.from_error(
                NotAllowed("only the user who runs the head may do this", hint="use that user's potluck command")
            )

    async def status(request: Request) -> Response:
        return json_response(await asyncio.to_thread(head.report))

    async def replan(request: Request) -> Response:
        check(request)
        return json_response({"better_plan": better_report(head.request_replan())})

    async def invite(request: Request) -> Response:
        check(request)
        try:
            made, code = await asyncio.to_thread(head.invite)
        except PotluckError as error:
            raise ApiError.from_error(error) from error
        return json_response(
            {
                "invite": made,
                "code": code,
                "code_expires_s": CODE_LIFETIME_S,
                "invite_expires_s": INVITE_LIFETIME_S,
            }
        )

    async def approve(request: Request) -> Response:
        check(request)
        asked = await _body(request, CandidateDecision)
        try:
            return json_response({"name": head.decide_candidate(asked.name, asked.allow)})
        except PotluckError as error:
            raise ApiError.from_error(error) from error

    async def files(request: Request) -> Response:
        check(request)
        wanted = await _body(request, FileQuery)
        return json_response(await asyncio.to_thread(head.find_file, wanted.sha256))

    async def models(request: Request) -> Response:
        check(request)
        return json_response(await asyncio.to_thread(head.list_models))

    return [
        Route("/potluck/status", status),
        Route("/potluck/files", files, methods=["POST"]),
        Route("/potluck/models", models),
        Route("/potluck/replan", replan, methods=["POST"]),
        Route("/potluck/invite", invite, methods=["POST"]),
        Route("/potluck/approve", approve, methods=["POST"]),
    ]


async def _body(request: Request, kind: type[Body]) -> Body:
    data = b""
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for part in request.stream():
                data += part
                if len(data) > _MAX_BODY_BYTES:
                    raise ApiError(413, f"more than {_MAX_BODY_BYTES} bytes", code="body_too_large")
    except (TimeoutError, ClientDisconnect):
        raise ApiError(408, f"the request's body did not come within {_BODY_TIMEOUT_S:.0f} s") from None
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body can't be read: {error}") from error
