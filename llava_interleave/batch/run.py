"""Samples answered in the order that shares most, and written in the order they came.

Rows grow in a journal beside the output, so a killed run goes on; the output appears when it is complete.
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
from ..journal import Journal
from ..options import Options
from .sources import JsonRow, Sample, Source


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: text, why it ended, and the numbers of tokens of the prompt and of the answer."""

    text: str
    finish_reason: str
    prompt: int
    generated: int


Answerer = Callable[[Sequence[Any], Options], Sequence[Reply | LlavaError]]
"""Conversations, or what was made of them elsewhere -> a reply to each, or why there is none."""
Groups = Sequence[Sequence[int]]
"""Samples that belong together, by number."""
Computed = Iterable[tuple[Sequence[int], Sequence[JsonRow]]]
"""A group, and the row of each of its samples."""


def order(media: Sequence[Sequence[str]]) -> list[int]:
    """Positions so that samples which share media, also through others, stand together, those with equal beginnings nearest."""
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
    answer: Answerer,
    options: Options,
    about: Mapping[str, Any],
    *,
    batch: int = 32,
    say: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """Answer all samples into `out`, a row each, in their order; how many there are, and how many have an error."""

    def compute(groups: Groups) -> Computed:
        for group in groups:
            yield group, rows([source.sample(i) for i in group], answer, options)

    return write(source, out, compute, about, batch=batch, say=say)


def write(
    source: Source,
    out: Path,
    compute: Callable[[Groups], Computed],
    about: Mapping[str, Any],
    *,
    batch: int,
    say: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """As `run`, for whoever computes: `compute` is given groups of at most `batch` samples and gives their rows, in any order."""
    if out.exists():
        raise DataError(f"{out} is there already; take it away or name another file")
    journal_path = out.with_name(out.name + ".part")
    with Journal(journal_path, {"input": source.digest, **about}) as journal:
        ranked = order([source.media(i) for i in range(len(source))])
        todo = [i for i in ranked if str(i) not in journal.done]
        if say:
            say(len(journal.done), len(source))
        for group, made in compute(
            [todo[first : first + batch] for first in range(0, len(todo), batch)]
        ):
            journal.add({"id": str(i), "row": row} for i, row in zip(group, made, strict=True))
            if say:
                say(len(journal.done), len(source))
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


def rows(samples: Sequence[Sample], answer: Answerer, options: Options) -> list[JsonRow]:
    """The rows of samples; neighbours with equal options are computed together."""
    made: list[JsonRow] = []
    for own, same in groupby(
        samples, key=lambda sample: (sample.error is None, dict(sample.options))
    ):
        members = list(same)
        said: Sequence[Reply | LlavaError]
        try:
            chosen = options.but(own[1])
        except OptionError as error:
            said = [error] * len(members)
        else:
            said = answer([sample.messages for sample in members], chosen) if own[0] else []
        replies = iter(said)
        made += [_row(sample, sample.error or next(replies)) for sample in members]
        assert next(replies, None) is None, "one answer to each sample"
    return made


def _row(sample: Sample, said: Reply | LlavaError) -> JsonRow:
    failed = isinstance(said, LlavaError)
    if not sample.openai:
        return (
            {"id": sample.id, "error": str(said)} if failed else {"id": sample.id, **_answer(said)}
        )
    name = hashlib.blake2b(
        sample.id.encode("utf-8", "backslashreplace"), digest_size=12
    ).hexdigest()
    if isinstance(said, LlavaError):
        body: JsonRow = {
            "error": {
                "message": str(said),
                "type": "invalid_request_error",
                "code": type(said).__name__,
            }
        }
    else:
        message = {"role": "assistant", "content": said.text}
        usage = {
            "prompt_tokens": said.prompt,
            "completion_tokens": said.generated,
            "total_tokens": said.prompt + said.generated,
        }
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": said.finish_reason,
            "logprobs": None,
        }
        about = {
            "id": f"chatcmpl-{name}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": sample.model,
        }
        body = {**about, "choices": [choice], "usage": usage}
    status = said.http_status if isinstance(said, LlavaError) else 200
    response = {"status_code": status, "request_id": f"req_{name}", "body": body}
    return {"id": f"batch_req_{name}", "custom_id": sample.id, "response": response, "error": None}


def _answer(said: Reply | LlavaError) -> JsonRow:
    assert isinstance(said, Reply)
    usage = {"prompt": said.prompt, "generated": said.generated}
    return {"answer": said.text, "finish_reason": said.finish_reason, "usage": usage}


def _failed(row: JsonRow) -> bool:
    return row["response"]["status_code"] != 200 if "response" in row else "error" in row
