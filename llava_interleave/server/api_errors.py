"""Exceptions as OpenAI-style errors: full messages for client errors (4xx), opaque ids for 5xx."""

from __future__ import annotations

import logging
import re
import secrets
from typing import Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..errors import ContextError, LlavaError, MediaError

log = logging.getLogger("llava_interleave.server")
MAX_MESSAGE = 1000
"""Characters of a message, which may repeat input."""


class ApiError(Exception):
    """An error response with its HTTP status. retry: seconds for the Retry-After header.

    close: the connection ends with it.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry = status, code, param, retry
        self.close = close


class ClientDisconnected(Exception):
    """The client has disconnected, or no longer reads the response."""


class ErrorBody(BaseModel):
    """An error; param names the field it is about."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """The body of every 4XX and 5XX response."""

    error: ErrorBody


def to_api_error(error: Exception) -> ApiError:
    """The error response of any exception. An unexpected one is logged under an id."""
    api_error = _to_api_error(error)
    clear_traceback(error)
    if isinstance(error, RequestValidationError):
        for detail in error.errors():
            if isinstance(cause := detail.get("ctx", {}).get("error"), Exception):
                clear_traceback(cause)
    return api_error


def clear_traceback(error: BaseException | None) -> None:
    """Drop the tracebacks of an exception and its causes.

    Their frames refer to the request and to the exception: a cycle of megabytes until the next full
    collection.
    """
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _to_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextError):
        # The words that LiteLLM and the SDKs look for.
        message = f"This model's maximum context length is exceeded: {error}"
        return ApiError(error.http_status, "context_length_exceeded", message)
    if type(error) is MediaError:
        return ApiError(error.http_status, "invalid_image", str(error))
    if isinstance(error, LlavaError):
        code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower()
        return ApiError(error.http_status, code, str(error))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        if first["type"] == "json_invalid":  # its place is a position, and no field
            return ApiError(400, "invalid_json", f"the body is not JSON: {first['ctx']['error']}")
        field = ".".join(str(step) for step in first["loc"][1:])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "this server does not have this field"
        message = f"{field}: {message}" if field else message
        return ApiError(400, "invalid_value", message, param=field or None)
    if isinstance(error, HTTPException):
        codes = {404: "not_found", 405: "method_not_allowed"}
        code = codes.get(error.status_code, "invalid_request")
        return ApiError(error.status_code, code, str(error.detail))
    error_id = secrets.token_hex(6)
    log.error("error %s", error_id, exc_info=error)
    return ApiError(500, "internal_error", f"internal error {error_id}; see the server log")


def error_body(error: ApiError) -> ErrorResponse:
    """An error in OpenAI's form."""
    return ErrorResponse(
        error=ErrorBody(
            message=str(error).encode("utf-8", "replace").decode()[:MAX_MESSAGE],
            type="server_error" if error.status >= 500 else "invalid_request_error",
            param=error.param,
            code=error.code,
        )
    )


def error_response(error: ApiError) -> Response:
    """An error as the whole response."""
    headers = {} if error.retry is None else {"Retry-After": str(error.retry)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.close:
        headers["Connection"] = "close"
    content = error_body(error).model_dump_json()
    return Response(content, error.status, headers, "application/json")
