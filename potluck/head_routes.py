"""What the head's own commands ask it: its status, a better plan, an invite, and whether a host may come in."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from devices.credentials import CODE_LIFETIME_S, INVITE_LIFETIME_S
from potluck.http.errors import ApiError
from potluck.plan_watch import BetterPlan
from potluck.status import StatusReport, better_report
from transport.errors import PotluckError

_MAX_BODY_BYTES = 4096


class HeadControl(Protocol):
    """What the routes ask; all of it thread-safe."""

    def report(self) -> StatusReport: ...

    def request_replan(self) -> BetterPlan | None: ...

    def invite(self) -> tuple[str, str]:
        """A fresh invite and a fresh code. Raises NotRunning without a network."""

    def answer(self, name: str, allow: bool) -> str:
        """Let in, or refuse, the host that waits under that name; its name. Raises BadRequest, NotRunning."""


class Approval(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    allow: bool


def head_routes(head: HeadControl) -> list[Route]:
    async def status(request: Request) -> Response:
        return _json(await asyncio.to_thread(head.report))

    async def replan(request: Request) -> Response:
        return _json({"better_plan": better_report(head.request_replan())})

    async def invite(request: Request) -> Response:
        try:
            made, code = await asyncio.to_thread(head.invite)
        except PotluckError as error:
            raise ApiError.of(error) from error
        return _json(
            {
                "invite": made,
                "code": code,
                "code_expires_s": CODE_LIFETIME_S,
                "invite_expires_s": INVITE_LIFETIME_S,
            }
        )

    async def approve(request: Request) -> Response:
        asked = await _body(request)
        try:
            return _json({"name": head.answer(asked.name, asked.allow)})
        except PotluckError as error:
            raise ApiError.of(error) from error

    return [
        Route("/potluck/status", status),
        Route("/potluck/replan", replan, methods=["POST"]),
        Route("/potluck/invite", invite, methods=["POST"]),
        Route("/potluck/approve", approve, methods=["POST"]),
    ]


async def _body(request: Request) -> Approval:
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > _MAX_BODY_BYTES:
            raise ApiError(413, f"more than {_MAX_BODY_BYTES} bytes", code="too_large")
    try:
        return msgspec.json.decode(data, type=Approval)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body can't be read: {error}") from error


def _json(facts: Any) -> Response:
    return Response(msgspec.json.encode(facts), media_type="application/json")
