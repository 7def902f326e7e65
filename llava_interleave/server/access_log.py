"""The access log: one line for each request, also for refused ones. Knows no model."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
MAX_PATH = 200
HANDLED = ("model", "user", "prompt_tokens", "completion_tokens", "error", "spans")
log = logging.getLogger("llava_interleave.access")


@dataclass(slots=True)
class RequestRecord:
    """What the access log and the trace say about a request; its handlers fill it in.

    start: seconds since the epoch. key: the client's name. error: the code of the error that ended
    it, or "client_disconnected". spans: (name, start, end). throttled: one refusal too many of this
    address, which only counts.
    """

    request_id: str
    address: str
    method: str
    path: str
    start: float = field(default_factory=time.time)
    key: str = ""
    weight: float = 1.0
    model: str | None = None
    user: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    body_bytes: int = 0
    error: str | None = None
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    throttled: bool = False

    @classmethod
    def of(cls, scope: Scope) -> RequestRecord:
        """A new request; X-Request-Id names it where the client has a plain one."""
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = f"req-{secrets.token_hex(12)}"
        address = (scope.get("client") or ("",))[0]
        return cls(request_id, address, scope["method"], scope["path"][:MAX_PATH])

    def add_tokens(self, prompt: int, completion: int = 0) -> None:
        """Tokens that were computed for it, or taken from the prefix cache."""
        self.prompt_tokens = (self.prompt_tokens or 0) + prompt
        self.completion_tokens = (self.completion_tokens or 0) + completion

    def update(self, fields: Mapping[str, Any]) -> None:
        """What a replica says about it, as by `handled`."""
        for name in HANDLED:
            setattr(self, name, fields[name])

    def handled(self) -> dict[str, Any]:
        """The fields that are known only after the request was handled."""
        return {name: getattr(self, name) for name in HANDLED}


_current: ContextVar[RequestRecord] = ContextVar("record")


def begin_record(record: RequestRecord) -> None:
    """Make it the record of the running task and of those that it starts."""
    _current.set(record)


def current_record() -> RequestRecord:
    """The record of the request that the running task belongs to, else a discarded one."""
    return _current.get(None) or RequestRecord("", "", "", "")


class AccessLog:
    """Writes a record as a line of JSON or text."""

    def __init__(self, form: str) -> None:
        self.form = form
        self.suppressed = 0

    def write(self, record: RequestRecord, route: str, status: int) -> None:
        """Status 0: the client was gone before a response."""
        if self.form == "off":
            return
        if record.throttled:
            self.suppressed += 1
            return
        milliseconds = round(1000 * (time.time() - record.start), 1)
        if self.form == "text":
            tokens = f"{record.prompt_tokens or 0}+{record.completion_tokens or 0} tokens"
            log.info(
                "%s %s %s %s %d %s %.1f ms %s %s",
                record.address or "-",
                record.key or "-",
                record.method,
                json.dumps(record.path)[1:-1],
                status,
                tokens,
                milliseconds,
                record.error or "-",
                record.request_id,
            )
            return
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.start, UTC).isoformat(timespec="milliseconds"),
            "request_id": record.request_id,
            "key": record.key or None,
            "address": record.address,
            "method": record.method,
            "route": route,
            "path": record.path,
            "status": status,
            "error": record.error,
            "model": record.model,
            "user": record.user,
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "body_bytes": record.body_bytes,
            "milliseconds": milliseconds,
        }
        if self.suppressed:
            line["suppressed"], self.suppressed = self.suppressed, 0
        log.info("%s", json.dumps(line))
