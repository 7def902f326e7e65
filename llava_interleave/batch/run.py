"""Answer samples in the order that shares most prefixes, and write them in their own order.

Rows go to a journal next to the output, so that a killed run resumes; the output appears when it
is complete.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import DataError, LlavaError, OptionError
from ..journal import Journal, JsonRow
from ..options import Options
from .sources import Sample, Source


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: text, finish reason, and the numbers of tokens of the prompt and of the answer."""

    text: str
    finish_reason: str
    prompt: int
    generated: int


ReplyFn = Callable[[Sequence[Any], Options], Sequence[Reply | LlavaError]]
"""Conversations, or prompts made of them elsewhere -> a reply to each, or an error."""
Groups = Sequence[Sequence[int]]
"""Batches of samples, by number."""
Computed = Iterable[tuple[Sequence[int], Sequence[JsonRow]]]
"""A batch, and the row of each of its samples."""


def order(media: Sequence[Sequence[str]]) -> list[int]:
    """Positions that put samples with common media together (also through a third sample), those
    with equal beginnings closest.
    """
    parent = list(range(len(media)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[str, int] = {}
    for i, names in enumerate(media):
        for name in names:
            a, b = root(i), root(first.setdefault(name, i))
            parent[max(a, b)] = min(a, b)
    return sorted(range(len(media)), key=lambda i: (root(i), list(media[i]), i))


def run(
    source: Source,
    out: Path,
    answer: ReplyFn,
    options: Options,
    about: Mapping[str, Any],
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """Answer all samples into `out`, one row each, in order. Returns their number, and how many
    have an error.
    """

    def compute(groups: Groups) -> Computed:
        for group in groups:
            yield group, answer_samples([source.sample(i) for i in group], answer, options)

    return write(source, out, compute, about, batch_size=batch_size, progress=progress)


def write(
    source: Source,
    out: Path,
    compute: Callable[[Groups], Computed],
    about: Mapping[str, Any],
    *,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """As `run`, with a function that gets batches of at most `batch_size` samples and yields their
    rows, in any order.
    """
    if out.exists():
        raise DataError(f"{out} already exists; delete it or choose another output file")
    journal_path = out.with_name(out.name + ".part")
    with Journal(journal_path, {"input": source.digest, **about}) as journal:
        ranked = order([source.media(i) for i in range(len(source))])
        todo = [i for i in ranked if str(i) not in journal.done]
        if progress:
            progress(len(journal.done), len(source))
        for group, rows in compute(
            [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
        ):
            journal.add({"id": str(i), "row": row} for i, row in zip(group, rows, strict=True))
            if progress:
                progress(len(journal.done), len(source))
        failed = 0
        draft = out.with_name(f".{out.name}.draft")
        with draft.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for i in range(len(source)):
                entry = journal.row(str(i))
                failed += _failed(entry["row"])
                file.write(json.dumps(entry["row"], ensure_ascii=False) + "\n")
        draft.replace(out)
    journal_path.unlink()
    return len(source), failed


def answer_samples(samples: Sequence[Sample], answer: ReplyFn, options: Options) -> list[JsonRow]:
    """The rows of samples; neighbors with equal options are one batch."""
    rows: list[JsonRow] = []
    for own, same in groupby(
        samples, key=lambda sample: (sample.error is None, dict(sample.options))
    ):
        members = list(same)
        results: Sequence[Reply | LlavaError]
        try:
            merged = options.but(own[1])
        except OptionError as error:
            results = [error] * len(members)
        else:
            results = answer([sample.messages for sample in members], merged) if own[0] else []
        replies = iter(results)
        rows += [_row(sample, sample.error or next(replies)) for sample in members]
        assert next(replies, None) is None, "one answer to each sample"
    return rows


def _row(sample: Sample, reply: Reply | LlavaError) -> JsonRow:
    failed = isinstance(reply, LlavaError)
    if not sample.openai:
        return (
            {"id": sample.id, "error": str(reply)}
            if failed
            else {"id": sample.id, **_answer(reply)}
        )
    name = hashlib.blake2b(
        sample.id.encode("utf-8", "backslashreplace"), digest_size=12
    ).hexdigest()
    if isinstance(reply, LlavaError):
        body: JsonRow = {
            "error": {
                "message": str(reply),
                "type": "invalid_request_error",
                "code": type(reply).__name__,
            }
        }
    else:
        message = {"role": "assistant", "content": reply.text}
        usage = {
            "prompt_tokens": reply.prompt,
            "completion_tokens": reply.generated,
            "total_tokens": reply.prompt + reply.generated,
        }
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": reply.finish_reason,
            "logprobs": None,
        }
        about = {
            "id": f"chatcmpl-{name}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": sample.model,
        }
        body = {**about, "choices": [choice], "usage": usage}
    status = reply.http_status if isinstance(reply, LlavaError) else 200
    response = {"status_code": status, "request_id": f"req_{name}", "body": body}
    return {"id": f"batch_req_{name}", "custom_id": sample.id, "response": response, "error": None}


def _answer(reply: Reply | LlavaError) -> JsonRow:
    assert isinstance(reply, Reply)
    usage = {"prompt": reply.prompt, "generated": reply.generated}
    return {"answer": reply.text, "finish_reason": reply.finish_reason, "usage": usage}


def _failed(row: JsonRow) -> bool:
    return row["response"]["status_code"] != 200 if "response" in row else "error" in row
