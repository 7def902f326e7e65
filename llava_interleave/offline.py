"""Many samples from a file or a folder, answered in the order that shares most, written in the order they came.

Rows grow in a journal beside the output, so a killed run goes on; the output appears when it is complete. A sample that cannot be
read or answered has its error in its row. Knows nothing of how answers are made.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .errors import DataError, LlavaError, OptionError, Unsupported
from .journal import Journal
from .options import Options

FILMS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".ts", ".mts", ".m2ts", ".gif")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MEDIA = re.compile(r"(image|video)\w*")
"""Names of columns and keys that hold a file, or a list of them."""
BODY = {
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "temperature": "temperature", "top_p": "top_p",
    "seed": "seed", "stop": "stop", "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty",
}  # fmt: skip
"""OpenAI's names of options -> ours."""
HARMLESS = ("model", "messages", "user", "metadata", "store", "service_tier")
"""What an OpenAI body may have besides, and does not change the answer."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """What to ask. options: what its row says of them. openai: its row is in OpenAI's batch format, and so is its answer's."""

    id: str
    messages: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    openai: bool = False
    error: LlavaError | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: text, why it ended, and the numbers of tokens of the prompt and of the answer."""

    text: str
    finish_reason: str
    prompt: int
    generated: int


Answerer = Callable[[Sequence[Sequence[Mapping[str, Any]]], Options], Sequence[Reply | LlavaError]]


class Source:
    """The samples of a .jsonl, .csv or .parquet file or of a folder. Of a .jsonl only the places of its lines are kept."""

    def __init__(self, path: Path, question: str | None = None) -> None:
        self.path, self.question = path, question
        state = hashlib.blake2b(f"{path.suffix} {question}".encode(), digest_size=16)
        self._lines: list[int] = []
        self._rows: list[Row] = []
        if not path.exists():
            raise DataError(f"{path} is not there")
        if path.suffix == ".jsonl" and path.is_file():
            with path.open("rb") as file:
                at = 0
                for line in file:
                    self._lines += [at] if line.strip() else []
                    state.update(line)
                    at += len(line)
        else:
            self._rows = _folder(path) if path.is_dir() else _table(path)
            state.update(repr(self._rows).encode("utf-8", "backslashreplace"))
        if not len(self):
            raise DataError(f"{path} has no samples")
        self.digest = state.hexdigest()

    def __len__(self) -> int:
        return len(self._lines) or len(self._rows)

    def sample(self, index: int) -> Sample:
        """A sample; one that cannot be read has the reason in `error`."""
        name = str(index + 1)
        row: Any = None
        try:
            if self._lines:
                with self.path.open("rb") as file:
                    file.seek(self._lines[index])
                    row = json.loads(file.readline())
            else:
                row = self._rows[index]
            if not isinstance(row, dict):
                raise DataError("the line holds no JSON object")
            given = row.get("custom_id", row.get("id"))
            name = name if given is None else str(given)
            return self._openai(name, row) if "custom_id" in row else self._plain(name, row)
        except (LlavaError, ValueError, RecursionError) as error:
            found = error if isinstance(error, LlavaError) else DataError(f"the line is no JSON: {error}")
            return Sample(name, openai=isinstance(row, dict) and "custom_id" in row, error=found)

    def _plain(self, name: str, row: Row) -> Sample:
        if "messages" in row:
            return Sample(name, [_placed(message, self.path) for message in _list(row["messages"], "messages")])
        question = row.get("question") or self.question
        if not isinstance(question, str):
            raise DataError("the sample has neither a question nor messages; --question is asked of all that have none")
        files: list[Any] = []
        for key, value in row.items():
            if key is not None and MEDIA.fullmatch(key) and value not in (None, ""):
                files += value if isinstance(value, list) else [value]
        if not all(isinstance(file, str) for file in files):
            raise DataError("images and videos are given as texts: paths or URLs")
        if None in row:  # what csv.DictReader calls the cells beyond the header
            raise DataError(f"the row has more cells than the header has names: {row[None]}")  # type: ignore[index]
        media = [part(file, self.path if self.path.is_dir() else self.path.parent) for file in files]
        pieces = question.split("<image>")
        if len(pieces) == 1:
            return Sample(name, [{"role": "user", "content": [*media, {"type": "text", "text": question}]}])
        if len(pieces) != len(media) + 1:
            raise DataError(f"the question has {len(pieces) - 1} <image>, but the sample has {len(media)} files")
        mixed = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
        for file, piece in zip(media, pieces[1:], strict=True):
            mixed += [file, {"type": "text", "text": piece}] if piece else [file]
        return Sample(name, [{"role": "user", "content": mixed}])

    def _openai(self, name: str, row: Row) -> Sample:
        body = row.get("body")
        if row.get("url") != "/v1/chat/completions" or not isinstance(body, dict):
            raise DataError("a line of OpenAI's batch format has the url /v1/chat/completions and a body")
        if unknown := [
            key for key in body if key not in (*BODY, *HARMLESS) and (key, body[key]) not in (("n", 1), ("stream", False))
        ]:
            raise OptionError(f"the body has {', '.join(unknown)}, which is not offered here")
        options = {BODY[key]: value for key, value in body.items() if key in BODY and value is not None}
        if wrong := [name for name in options if name != "stop" and not isinstance(options[name], int | float)]:
            raise OptionError(f"{', '.join(wrong)} must be numbers")
        if isinstance(options.get("stop"), list):
            options["stop"] = tuple(options["stop"])
        return Sample(name, _list(body.get("messages"), "messages"), options, openai=True)


def part(file: str, folder: Path) -> dict[str, Any]:
    """The message part of a path, below `folder` unless it is absolute, or of a URL."""
    if re.match(r"https?://|data:", file):
        film = file.startswith("data:video/") or urlsplit(file).path.lower().endswith(FILMS)
        return {"type": "video" if film else "image", "url": file}
    path = folder / file
    return {"type": "video" if path.suffix.lower() in FILMS or path.is_dir() else "image", "path": str(path)}


def _placed(message: Any, source: Path) -> Any:
    """A message whose relative paths begin at the file's folder, as those of columns do."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = [
        {**p, "path": str(source.parent / p["path"])} if isinstance(p, dict) and isinstance(p.get("path"), str) else p
        for p in message["content"]
    ]
    return {**message, "content": parts}


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{name} is no list")
    return value


def _table(path: Path) -> list[Row]:
    if path.suffix == ".csv":
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file))
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(f"{path} cannot be read as CSV in UTF-8: {error}") from error
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise Unsupported(
                "reading Parquet needs pyarrow: pip install pyarrow, or give the samples as .jsonl or .csv"
            ) from error
        return list(parquet.read_table(path).to_pylist())
    raise DataError(f"{path} is neither .jsonl, .csv or .parquet nor a folder")


def _folder(folder: Path) -> list[Row]:
    """A sample a file, and one a sub-folder with all its pictures, in natural order."""
    rows: list[Row] = []
    for path in sorted(folder.iterdir(), key=_natural):
        if path.is_dir():
            files = sorted((f for f in path.iterdir() if f.suffix.lower() in (*PICTURES, *FILMS)), key=_natural)
            rows += [{"id": path.name, "images": [f"{path.name}/{file.name}" for file in files]}] if files else []
        elif path.suffix.lower() in (*PICTURES, *FILMS):
            rows.append({"id": path.name, "images": [path.name]})
    return rows


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", path.name)]


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


def media_of(sample: Sample) -> list[str]:
    """What tells a sample's media apart: a hash of where each comes from."""
    parts = [p for m in sample.messages if isinstance(m, Mapping) and isinstance(m.get("content"), list) for p in m["content"]]
    named = (p for p in parts if isinstance(p, Mapping) and p.get("type") != "text")
    return [hashlib.blake2b(json.dumps(p, sort_keys=True, default=str).encode(), digest_size=8).hexdigest() for p in named]


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
    if out.exists():
        raise DataError(f"{out} is there already; take it away or name another file")
    journal_path = out.with_name(out.name + ".part")
    with Journal(journal_path, {"input": source.digest, **about}) as journal:
        ranked = order([media_of(source.sample(i)) for i in range(len(source))])
        todo = [i for i in ranked if str(i) not in journal.done]
        for first in range(0, len(todo), batch):
            if say:
                say(len(source) - len(todo) + first, len(source))
            group = todo[first : first + batch]
            samples = [source.sample(i) for i in group]
            journal.add({"id": str(i), "row": row} for i, row in zip(group, _rows(samples, answer, options), strict=True))
        if say:
            say(len(source), len(source))
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


def _rows(samples: Sequence[Sample], answer: Answerer, options: Options) -> Iterator[Row]:
    """The rows of samples; neighbours with equal options are computed together."""
    for own, same in groupby(samples, key=lambda sample: (sample.error is None, dict(sample.options))):
        members = list(same)
        said: Sequence[Reply | LlavaError]
        try:
            chosen = options.but(own[1])
        except OptionError as error:
            said = [error] * len(members)
        else:
            said = answer([sample.messages for sample in members], chosen) if own[0] else []
        replies = iter(said)
        for sample in members:
            yield _row(sample, sample.error or next(replies))
        assert next(replies, None) is None, "one answer to each sample"


def _row(sample: Sample, said: Reply | LlavaError) -> Row:
    failed = isinstance(said, LlavaError)
    if not sample.openai:
        return {"id": sample.id, "error": str(said)} if failed else {"id": sample.id, **_answer(said)}
    if isinstance(said, LlavaError):
        body: Row = {"error": {"message": str(said), "type": "invalid_request_error", "code": type(said).__name__}}
    else:
        message = {"role": "assistant", "content": said.text}
        usage = {"prompt_tokens": said.prompt, "completion_tokens": said.generated, "total_tokens": said.prompt + said.generated}
        choice = {"index": 0, "message": message, "finish_reason": said.finish_reason}
        body = {"object": "chat.completion", "choices": [choice], "usage": usage}
    status = said.http_status if isinstance(said, LlavaError) else 200
    name = hashlib.blake2b(sample.id.encode("utf-8", "backslashreplace"), digest_size=12).hexdigest()
    response = {"status_code": status, "request_id": f"req_{name}", "body": body}
    return {"id": f"batch_req_{name}", "custom_id": sample.id, "response": response, "error": None}


def _answer(said: Reply | LlavaError) -> Row:
    assert isinstance(said, Reply)
    usage = {"prompt": said.prompt, "generated": said.generated}
    return {"answer": said.text, "finish_reason": said.finish_reason, "usage": usage}


def _failed(row: Row) -> bool:
    return row["response"]["status_code"] != 200 if "response" in row else "error" in row
