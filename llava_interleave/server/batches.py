"""OpenAI's batch API: requests of an uploaded file, answered while the engine has room for them.

Batches share the engine with a small weight, so that requests of people come first. What is done
is on disk: after a restart with the same --batch-dir a batch goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from .answer_stream import AnswerStream, answer
from .api_errors import ApiError, error_body, log, to_api_error
from .batch_files import BatchFiles, write
from .chat_completions import ChatCompletionStream
from .completions import TextCompletionStream
from .middleware import MAX_JSON_VALUES
from .models import ServedModels
from .openai_types import (
    Batch,
    BatchCounts,
    BatchError,
    BatchErrors,
    BatchList,
    BatchRequest,
    BatchStatus,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    ResponsesRequest,
)
from .responses import ResponseStream
from .service import Service
from .settings import MB

ENDPOINTS: Mapping[str, tuple[type[GenerationRequest], type[AnswerStream]]] = {
    "/v1/chat/completions": (ChatRequest, ChatCompletionStream),
    "/v1/completions": (CompletionRequest, TextCompletionStream),
    "/v1/responses": (ResponsesRequest, ResponseStream),
}
MAX_RUNNING = 8
"""Requests of batches that run at a time while the server has nothing else to do; else one."""
MAX_REQUESTS = 50_000
MAX_UNFINISHED, MAX_FINISHED = 16, 256
"""Batches of an API key."""
MAX_ERRORS = 20
"""Errors of an input file that are listed."""
WINDOW = 24 * 3600
POLL = 0.1
"""Seconds between two looks whether the server is idle."""


@dataclass(eq=False)
class RunningBatch:
    """A batch that is not finished, with the requests that are left of its file."""

    key: str
    batch: Batch
    lines: Iterator[tuple[str, dict[str, Any]]]
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    exhausted: bool = False


class Batches:
    """The batches of all API keys. Use it from the event loop."""

    def __init__(self, service: Service | ServedModels) -> None:
        self.service = service
        folder = service.settings.batch_dir
        self._temporary = None if folder else Path(tempfile.mkdtemp(prefix="llava-batches-"))
        self.files = BatchFiles(folder or self._temporary or Path(), service.settings.batch_mb * MB)
        self._by_key: dict[str, dict[str, Batch]] = {}
        self._running: dict[str, RunningBatch] = {}
        self._wake = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        for path in sorted(self.files.folder.glob("*/batch_*.json")):
            key = "" if path.parent.name == "none" else path.parent.name
            batch = Batch.model_validate_json(path.read_bytes())
            self._by_key.setdefault(key, {})[batch.id] = batch
            if batch.status == "in_progress":
                self._resume(key, batch)

    def start(self) -> None:
        """Answer requests from now on."""
        self._runner = asyncio.ensure_future(self._run())

    async def close(self) -> None:
        """Stop; with --batch-dir a later server goes on."""
        tasks = [task for running in self._running.values() for task in running.tasks]
        tasks += [self._runner] if self._runner else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)

    async def create(self, request: BatchRequest, key: str) -> Batch:
        """Start a batch; one whose file has an error has the status failed. Raises ApiError."""
        path = self.files.path(key, request.input_file_id)
        mine = self._by_key.setdefault(key, {})
        unfinished = sum(batch.status == "in_progress" for batch in mine.values())
        if unfinished >= MAX_UNFINISHED:
            raise ApiError(
                429,
                "too_many_batches",
                f"{unfinished} batches of this API key are not finished, the limit; wait for one "
                "or cancel it",
                retry=60,
            )
        max_bytes = self.service.settings.max_body_mb * MB
        total, errors = await self.service.run_in_pool(
            key, lambda: _validate(path, request.endpoint, max_bytes)
        )
        now = int(time.time())
        batch = Batch(
            id=f"batch_{secrets.token_hex(12)}",
            endpoint=request.endpoint,
            input_file_id=request.input_file_id,
            completion_window=request.completion_window,
            status="failed" if errors else "in_progress",
            errors=BatchErrors(data=errors) if errors else None,
            created_at=now,
            in_progress_at=None if errors else now,
            failed_at=now if errors else None,
            expires_at=now + WINDOW,
            request_counts=BatchCounts(total=total, completed=0, failed=0),
            metadata=request.metadata,
        )
        mine[batch.id] = batch
        self._save(key, batch)
        finished = [one for one in mine.values() if one.status != "in_progress"]
        for old in finished[: max(0, len(finished) - MAX_FINISHED)]:
            del mine[old.id]
            self._path(key, old, "json").unlink(missing_ok=True)
        if not errors:
            self._running[batch.id] = RunningBatch(key, batch, _lines(path, frozenset()))
            self._wake.set()
        return batch

    def get(self, key: str, name: str) -> Batch:
        """Raises ApiError for a batch that this key does not have."""
        if (batch := self._by_key.get(key, {}).get(name)) is None:
            raise ApiError(404, "batch_not_found", f"no such batch: {name[:80]!r}")
        return batch

    def list(self, key: str, after: str | None, limit: int) -> BatchList:
        """The batches of a key after the one named `after`, newest first."""
        batches = list(reversed(self._by_key.get(key, {}).values()))
        if after is not None:
            batches = batches[batches.index(self.get(key, after)) + 1 :]
        page = batches[:limit]
        return BatchList(
            data=page,
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=len(batches) > limit,
        )

    async def cancel(self, key: str, name: str) -> Batch:
        """End a batch; what is done is in its files. Raises ApiError for a finished one."""
        batch = self.get(key, name)
        if (running := self._running.get(name)) is None:
            raise ApiError(409, "batch_finished", f"the batch is {batch.status}")
        await self._finish(running, "cancelled")
        return batch

    def delete_file(self, key: str, name: str) -> None:
        """Delete a batch file. Raises ApiError for one that is not there or in use."""
        for running in self._running.values():
            if running.key == key and running.batch.input_file_id == name:
                raise ApiError(409, "file_in_use", f"{running.batch.id} uses the file; cancel it")
        self.files.delete(key, name)

    def _resume(self, key: str, batch: Batch) -> None:
        """Go on with a batch of an earlier server."""
        done: set[str] = set()
        counts = []
        for kind in ("output.part", "errors.part"):
            rows = _whole_rows(self._path(key, batch, kind))
            done.update(row["custom_id"] for row in rows)
            counts.append(len(rows))
        batch.request_counts.completed, batch.request_counts.failed = counts
        if self.files.has(key, batch.input_file_id):
            lines = _lines(self.files.path(key, batch.input_file_id), frozenset(done))
            self._running[batch.id] = RunningBatch(key, batch, lines)
            self._wake.set()

    async def _run(self) -> None:
        while True:
            waiting = any(not running.exhausted for running in self._running.values())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL if waiting else None):
                    await self._wake.wait()
            self._wake.clear()
            for running in list(self._running.values()):
                if time.time() > running.batch.expires_at:
                    await self._finish(running, "expired")
                elif running.exhausted and not running.tasks:
                    await self._finish(running, "completed")
            while chosen := self._next():
                if (line := next(chosen.lines, None)) is None:
                    chosen.exhausted = True
                    self._wake.set()
                    continue
                chosen.tasks.add(asyncio.ensure_future(self._task(chosen, *line)))

    async def _task(self, running: RunningBatch, custom_id: str, body: dict[str, Any]) -> None:
        try:
            await self._answer(running, custom_id, body)
        except Exception:  # noqa: BLE001  the disk, for example
            log.exception("%s is ended by an error", running.batch.id)
            running.batch.errors = BatchErrors(
                data=[BatchError(code="internal_error", message="see the server log")]
            )
            await self._finish(running, "failed")
        finally:
            running.tasks = running.tasks - {asyncio.current_task()}
            self._wake.set()

    def _next(self) -> RunningBatch | None:
        """The batch whose next request starts now: the API key with the fewest running first."""
        service = self.service
        running = [one for one in self._running.values() if not one.exhausted]
        count = sum(len(one.tasks) for one in self._running.values())
        limit = 1 if service.num_active else MAX_RUNNING
        if not running or count >= limit or service.unavailable():
            return None
        by_key: dict[str, int] = {}
        for one in self._running.values():
            by_key[one.key] = by_key.get(one.key, 0) + len(one.tasks)
        if (rate := service.state.token_rate) is not None:
            running = [one for one in running if rate.allows(one.key)]
        return min(running, key=lambda one: by_key[one.key], default=None)

    async def _answer(self, running: RunningBatch, custom_id: str, body: dict[str, Any]) -> None:
        batch, key = running.batch, running.key
        kind, stream = ENDPOINTS[batch.endpoint]
        status, counts = 200, batch.request_counts
        try:
            request = _request(kind, body)
            reply = await answer(self.service, stream, request, key, batch.id)
        except Exception as error:  # noqa: BLE001  becomes the row of this request
            if self.service.stopping:
                return
            api_error = to_api_error(error)
            status, reply = api_error.status, error_body(api_error)
        name = secrets.token_hex(12)
        response = {"status_code": status, "request_id": f"req_{name}", "body": reply.model_dump()}
        row = {"id": f"batch_req_{name}", "custom_id": custom_id, "response": response}
        data = json.dumps({**row, "error": None}).encode() + b"\n"
        try:
            self.files.check(key, len(data))
        except ApiError as full:
            batch.errors = BatchErrors(data=[BatchError(code=full.code, message=str(full))])
            await self._finish(running, "failed")
            return
        with self._path(key, batch, "output.part" if status == 200 else "errors.part").open(
            "ab"
        ) as file:
            file.write(data)
        counts.completed += status == 200
        counts.failed += status != 200

    async def _finish(self, running: RunningBatch, status: BatchStatus) -> None:
        """End a batch; its rows so far become files."""
        batch, key = running.batch, running.key
        if self._running.pop(batch.id, None) is None:
            return
        others = running.tasks - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for kind, attribute in (("output", "output_file_id"), ("errors", "error_file_id")):
            part, name = self._path(key, batch, f"{kind}.part"), f"{batch.id}_{kind}.jsonl"
            file = self.files.adopt(key, part, name, "batch_output")
            setattr(batch, attribute, file.id if file else None)
        batch.status = status
        setattr(batch, f"{status}_at", int(time.time()))
        self._save(key, batch)

    def _path(self, key: str, batch: Batch, kind: str) -> Path:
        return self.files.directory(key) / f"{batch.id}.{kind}"

    def _save(self, key: str, batch: Batch) -> None:
        write(self._path(key, batch, "json"), batch)


def _request(kind: type[GenerationRequest], body: dict[str, Any]) -> GenerationRequest:
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(
            [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        ) from error
    if request.stream:
        raise ApiError(400, "invalid_value", "stream: a batch has no streams", param="stream")
    return request


def _validate(path: Path, endpoint: str, max_bytes: int) -> tuple[int, list[BatchError]]:
    """The number of requests in an input file, and its errors."""
    errors: list[BatchError] = []
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(max_bytes + 1), b""), 1):
            if not line.strip():
                continue
            error = _fault(line, endpoint, seen, max_bytes)
            if len(seen) > MAX_REQUESTS:
                error = "too_many_requests", f"more than {MAX_REQUESTS:,} requests", None
            if error:
                code, message, param = error
                errors.append(BatchError(code=code, message=message, param=param, line=number))
                if len(errors) == MAX_ERRORS or code in ("line_too_large", "too_many_requests"):
                    break
    if not seen and not errors:
        errors = [BatchError(code="empty_file", message="the file has no requests")]
    return len(seen), errors


def _fault(
    line: bytes, endpoint: str, seen: set[str], max_bytes: int
) -> tuple[str, str, str | None] | None:
    """Why a line is no request: code, message and field."""
    values = sum(line.count(mark) for mark in (b",", b"[", b"{"))
    if len(line) > max_bytes or values > MAX_JSON_VALUES:
        return "line_too_large", f"the line has {len(line):,} bytes and {values:,} values", None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "invalid_json_line", "the line is not valid JSON", None
    if not isinstance(row, dict):
        return "invalid_json_line", "the line is not a JSON object", None
    name = row.get("custom_id")
    if not isinstance(name, str) or not 0 < len(name) <= 512:
        return "invalid_custom_id", "custom_id must be a text of 1 to 512 characters", "custom_id"
    if name in seen:
        return "duplicate_custom_id", f"custom_id {name[:60]!r} is there twice", "custom_id"
    seen.add(name)
    if row.get("method") != "POST":
        return "invalid_method", "method must be POST", "method"
    if row.get("url") != endpoint:
        return "mismatched_url", f"url must be the endpoint of the batch, {endpoint}", "url"
    if not isinstance(row.get("body"), dict):
        return "invalid_body", "body must be an object", "body"
    return None


def _lines(path: Path, done: frozenset[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The custom_id and body of each request that is not done."""
    with path.open("rb") as file:
        for line in file:
            if line.strip() and (row := json.loads(line))["custom_id"] not in done:
                yield row["custom_id"], row["body"]


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that a killed server may have left unfinished, which is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    with contextlib.suppress(OSError), path.open("r+b") as file:
        file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]
