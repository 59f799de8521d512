"""What the head's own commands ask it: its status, a better plan, an invite, and whether a host may come in.

Whoever may chat may see the status. The rest is for the head's own user: being given the API key, or an account on the
head's computer, lets nobody decide who is in the pool. What shows it is the secret in the head's file.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

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
Answer = Callable[[bytes], Any]


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
    """`secret` is what requests have to show, except for the status."""
    answers: dict[str, Answer] = {
        "models": lambda body: head.list_models(),
        "replan": lambda body: {"better_plan": better_report(head.request_replan())},
        "invite": lambda body: _invitation(head),
        "approve": lambda body: _decide_candidate(head, _decode(body, CandidateDecision)),
        "files": lambda body: head.find_file(_decode(body, FileQuery).sha256),
    }

    async def status(request: Request) -> Response:
        return json_response(await asyncio.to_thread(head.report))

    def guarded(answer: Answer) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            shown = request.headers.get(SECRET_HEADER, "")
            if not hmac.compare_digest(shown.encode(), secret.encode()):
                raise ApiError.from_error(
                    NotAllowed("only the user who runs the head may do this", hint="use that user's potluck command")
                )
            body = await _body(request) if request.method == "POST" else b""
            try:
                return json_response(await asyncio.to_thread(answer, body))
            except PotluckError as error:
                raise ApiError.from_error(error) from error

        return handle

    return [
        Route("/potluck/status", status),
        *(
            Route(f"/potluck/{name}", guarded(answer), methods=["GET" if name == "models" else "POST"])
            for name, answer in answers.items()
        ),
    ]


def _invitation(head: HeadControl) -> dict[str, Any]:
    made, code = head.invite()
    return {
        "invite": made,
        "code": code,
        "code_expires_s": CODE_LIFETIME_S,
        "invite_expires_s": INVITE_LIFETIME_S,
    }


def _decide_candidate(head: HeadControl, decision: CandidateDecision) -> dict[str, str]:
    return {"name": head.decide_candidate(decision.name, decision.allow)}


async def _body(request: Request) -> bytes:
    data = b""
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for part in request.stream():
                data += part
                if len(data) > _MAX_BODY_BYTES:
                    raise ApiError(413, f"more than {_MAX_BODY_BYTES} bytes", code="body_too_large")
    except (TimeoutError, ClientDisconnect):
        raise ApiError(408, f"the request's body did not come within {_BODY_TIMEOUT_S:.0f} s") from None
    return data


def _decode(body: bytes, kind: type[Body]) -> Body:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body can't be read: {error}") from error
