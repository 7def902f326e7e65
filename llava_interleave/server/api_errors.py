"""What a client is told when it gets no answer: our own words for its mistakes, an id and nothing else for ours."""

from __future__ import annotations

import logging
import re
import secrets
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ..errors import ContextError, LlavaError

log = logging.getLogger("llava_interleave.server")
LONGEST = 1000
"""Characters of a message: it may repeat what the client sent."""
UNKNOWN = "this server has no such field"


class ApiError(Exception):
    """A request that is not worked on, with its HTTP status; `retry`: seconds after which it may be tried again."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry = status, code, param, retry


class ClientDisconnected(Exception):
    """The client has left, or takes nothing more."""


def to_api_error(error: Exception) -> ApiError:
    """The refusal for any exception, of which nothing is kept; what is no mistake of the client goes to the log under an id."""
    refusal = _refusal(error)
    forget(error)
    if isinstance(error, RequestValidationError):
        for found in error.errors():
            if isinstance(cause := found.get("ctx", {}).get("error"), Exception):
                forget(cause)
    return refusal


def forget(error: BaseException | None) -> None:
    """Take its traceback from an exception that nobody reads any more, and from those behind it.

    Its frames hold the request, and some of them the exception: megabytes would stay until the next full garbage collection.
    """
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _refusal(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextError):
        return ApiError(error.http_status, "context_length_exceeded", str(error))
    if isinstance(error, LlavaError):
        code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower()
        return ApiError(error.http_status, code, str(error))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        field = ".".join(str(step) for step in first["loc"][1:])
        said = (
            UNKNOWN
            if first["type"] == "extra_forbidden"
            else first["msg"].removeprefix("Value error, ")
        )
        return ApiError(
            400, "invalid_value", f"{field}: {said}" if field else said, param=field or None
        )
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(
            error.status_code, "invalid_request"
        )
        return ApiError(error.status_code, code, str(error.detail))
    number = secrets.token_hex(6)
    log.error("error %s", number, exc_info=error)
    return ApiError(
        500, "internal_error", f"the server made a mistake; its log has it as error {number}"
    )


def body(refusal: ApiError) -> dict[str, Any]:
    """A refusal in OpenAI's form."""
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    message = str(refusal).encode("utf-8", "replace").decode()[:LONGEST]
    return {
        "error": {"message": message, "type": kind, "param": refusal.param, "code": refusal.code}
    }


def response(refusal: ApiError) -> JSONResponse:
    """A refusal as the whole answer to a request."""
    headers = {} if refusal.retry is None else {"Retry-After": str(refusal.retry)}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body(refusal), refusal.status, headers)
