"""Tables and searches over HTTP: the same questions about each of many images."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any

from ..chat.columns import TYPES, Column
from ..chat.table import (
    REASON_TOKENS,
    Cell,
    Row,
    find_hits,
    read_cell,
    read_reasoned,
    wants_reasons,
)
from ..errors import LlavaError, OptionError
from .answer_stream import AnswerStream, sse_event
from .api_errors import ApiError, error_body
from .chat_completions import ChatCompletionStream
from .openai_types import (
    ChatRequest,
    FindRequest,
    FindResult,
    ImageHit,
    TableCell,
    TableRequest,
    TableResult,
    TableRow,
)

if TYPE_CHECKING:
    from .models import ServedModels
    from .service import Service

IMAGES_IN_FLIGHT = 4
"""Images of one request that are computed together."""
TOP = 20
"""Alternatives of the token that says yes or no."""


class TableStream:
    """The rows of a table in order, each as soon as it and all before it are there.

    Every cell is a request of its own. Raises OptionError for columns that are none, and for more
    cells than the server's limit.
    """

    end = b"data: [DONE]\n\n"

    def __init__(self, service: Service | ServedModels, request: TableRequest, key: str) -> None:
        self.service, self.request, self.key = service, request, key
        self.columns = [
            Column(one.name, one.question, TYPES[one.type], tuple(one.choices))
            for one in request.columns
        ]
        if len({column.name for column in self.columns}) < len(self.columns):
            raise OptionError("two columns have the same name")
        images, limit = len(request.images), service.settings.max_table_cells
        if (cells := len(self.columns) * images) > limit:
            raise OptionError(
                f"{images} images and {len(self.columns)} columns are {cells:,} cells; this "
                f"server's limit is {limit:,}: send fewer images at a time"
            )

    async def rows(self) -> AsyncGenerator[TableRow | None]:
        """The rows; None after each `sse_keepalive` seconds of silence."""
        free = asyncio.Semaphore(min(IMAGES_IN_FLIGHT, self.service.shares.largest))
        silence = self.service.settings.sse_keepalive
        images = enumerate(self.request.images)
        tasks = [asyncio.ensure_future(self._row(*pair, free)) for pair in images]
        try:
            for task in tasks:
                while not (await asyncio.wait((task,), timeout=silence))[0]:
                    yield None
                yield task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def __aiter__(self) -> AsyncIterator[list[bytes]]:
        async with contextlib.aclosing(self.rows()) as rows:
            async for row in rows:
                yield [] if row is None else [sse_event(row)]

    def error(self, error: ApiError) -> bytes:
        """The event of an error that ends the stream."""
        return sse_event(error_body(error))

    async def whole(self) -> TableResult:
        """All rows."""
        async with contextlib.aclosing(self.rows()) as rows:
            return TableResult(rows=[row async for row in rows if row is not None])

    async def _row(self, index: int, image: str, free: asyncio.Semaphore) -> TableRow:
        found: dict[str, TableCell] = {}
        async with free:
            for column in self.columns:
                cell = await _cell(self.service, self.request.model, image, column, self.key)
                found[column.name] = TableCell(
                    value=cell.value,
                    probability=cell.probability,
                    allowed=cell.allowed,
                    error=cell.error or None,
                )
        return TableRow(index=index, cells=found)


async def find(service: Service | ServedModels, request: FindRequest, key: str) -> FindResult:
    """The images by the probability that the answer to a yes/no question is yes."""
    column = {"name": "hit", "question": request.question, "type": "bool"}
    asked = TableRequest.model_validate(
        {"model": request.model, "images": request.images, "columns": [column]}
    )
    rows = (await TableStream(service, asked, key).whole()).rows
    cells = [
        Row(row.index, {"hit": Cell(one.value, one.probability, one.allowed, one.error or "")})
        for row in rows
        for one in row.cells.values()
    ]
    hits = [
        ImageHit(index=int(str(hit.source)), probability=hit.probability, allowed=hit.allowed)
        for hit in find_hits(cells, "hit")
    ]
    errors = {row.index: row.cells["hit"].error or "" for row in rows if row.cells["hit"].error}
    return FindResult(hits=hits, errors=errors)


async def _cell(
    service: Service | ServedModels, model: str | None, image: str, column: Column, key: str
) -> Cell:
    """The answer to a column's question about an image alone; an error of it is in the cell."""
    cell, _ = await _answered(service, model, image, column, key, column.response_format)
    if wants_reasons(column, cell):
        _, reasoned = await _answered(service, model, image, column, key, None)
        return reasoned or cell
    return cell


async def _answered(
    service: Service | ServedModels,
    model: str | None,
    image: str,
    column: Column,
    key: str,
    limits: dict[str, Any] | None,
) -> tuple[Cell, Cell | None]:
    """The cell of an answer, and the one that `read_reasoned` finds without limits."""
    reasons = limits is None and column.response_format is not None
    request = ChatRequest.model_validate(
        {
            "model": model,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": image}},
                        {"type": "text", "text": column.question},
                    ],
                }
            ],
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "logprobs": True,
            "top_logprobs": TOP,
            **({"stop": "\n"} if limits is None else {"response_format": limits}),
            **({"max_completion_tokens": REASON_TOKENS} if reasons else {}),
        }
    )
    while True:
        try:
            async with service.generation(request, key) as prepared:
                stream: AnswerStream = ChatCompletionStream(prepared)
                async for _ in stream.deltas():
                    pass
                answer, tokenizer = stream.answers[0], stream.tokenizer
                if reasons:
                    return Cell(None), read_reasoned(column, answer, tokenizer)
                return read_cell(column, answer, tokenizer), None
        except ApiError as error:
            if error.status != 429 and error.code != "overloaded":
                raise
            await asyncio.sleep(error.retry or 1)  # other requests have the places
        except LlavaError as error:
            return Cell(None, error=str(error)), None
