"""API errors carry a status, a code and the field's name, in the form that OpenAI's clients expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from transport.errors import Busy, HostRevoked, ModelNotFound, PotluckError, RingDown, error_from_code
from transport.messages.requests import RequestFailed

_RETRY_AFTER_S = {Busy.code: 2, RingDown.code: 10, HostRevoked.code: 10}
# Messages and names repeat what was sent, which may be megabytes.
_MAX_CHARS = 1000


class ApiError(Exception):
    """An error with its HTTP status; `param` names the field that it is about."""

    def __init__(self, status: int, message: str, *, code: str = "invalid_request", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    @classmethod
    def from_error(cls, error: PotluckError, *, param: str | None = None) -> ApiError:
        message = f"{error.message}; {error.hint}" if error.hint else error.message
        return cls(error.status, message, code=error.code, param=param)

    @classmethod
    def from_failure(cls, failed: RequestFailed) -> ApiError:
        """The error that ended a request in the engine."""
        return cls.from_error(error_from_code(failed.code, failed.message, failed.hint), param=failed.param)

    def body(self) -> dict[str, Any]:
        param = None if self.param is None else _truncated(self.param)
        return {"error": {"message": _truncated(self.message), "type": self._type, "param": param, "code": self.code}}

    def response(self) -> Response:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.code in _RETRY_AFTER_S:
            headers["Retry-After"] = str(_RETRY_AFTER_S[self.code])
        return json_response(self.body(), self.status, headers)

    @property
    def _type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if 400 <= self.status < 500 else "server_error"


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json", headers=headers)


def model_not_found(requested: str, served: str) -> ApiError:
    return ApiError(
        404,
        f"the model {_truncated(requested)!r} is not served here; {served!r} is",
        code=ModelNotFound.code,
        param="model",
    )


def _truncated(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}…"
