"""The samples of a file, of shards or of a folder, one at a time.

Nothing is passed over in silence: each sample that cannot be read has an error in its row, and each
file that is not a sample is in `Source.skipped` with the reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .. import openai_body
from ..errors import DataError, LlavaError, OptionError
from ..journal import JsonRow
from ..parquet import Parquet
from . import folders, tables
from .webdataset import Embedded, Shards

IGNORED_KEYS = ("model", "messages", "user", "metadata", "store", "service_tier")
"""Keys of an OpenAI body that do not change the answer."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One question.

    messages: a conversation, or the prompt made of it elsewhere. options: those in its row. openai:
    its row is in OpenAI's batch format, and so is the answer's; model: the name in it.
    """

    id: str
    messages: Any = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    openai: bool = False
    model: str = ""
    error: LlavaError | None = None


class RowSource(Protocol):
    """Rows by number."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Any: ...


class JsonLines:
    """The lines of a .jsonl file that are not empty; only their offsets are in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self._starts = path, list[int]()
        with path.open("rb") as file:
            at = 0
            for line in file:
                self._starts += [at] if line.strip() else []
                at += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, index: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            return json.loads(file.readline().removeprefix(b"\xef\xbb\xbf"))


class RowList(list[JsonRow]):
    """Rows in memory: those of a table or a folder, without their media."""

    def row(self, index: int) -> JsonRow:
        return self[index]


class Source:
    """The samples of a .jsonl, .csv, .tsv, .parquet or .tar file, or of a folder.

    skipped: files that are not samples, and why.
    """

    def __init__(self, path: Path, question: str | None = None) -> None:
        self.path, self.question = path, question
        if not path.exists():
            raise DataError(f"{path} does not exist")
        self._folder = path if path.is_dir() else path.parent
        self._rows, self.skipped, contents = _open(path)
        if not len(self):
            names = "; ".join(f"{name}: {why}" for name, why in self.skipped[:10])
            raise DataError(f"{path} has no samples" + (f" ({names})" if names else ""))
        self.digest = hashlib.blake2b(
            f"{path.suffix} {question} {contents}".encode("utf-8", "backslashreplace"),
            digest_size=16,
        ).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def media(self, index: int) -> list[str]:
        """A key of each media file of a sample; none for media within shards and tables, which no
        other sample has.
        """
        if isinstance(self._rows, Shards):
            return []
        if isinstance(self._rows, Parquet) and any(
            "binary" in kind for kind in self._rows.columns.values()
        ):
            return []
        return media_keys(self.sample(index))

    def sample(self, index: int) -> Sample:
        """A sample; one that cannot be read has the reason in `error`."""
        name = self._rows.key(index) if isinstance(self._rows, Shards) else str(index + 1)
        row: Any = None
        try:
            row = self._rows.row(index)
            if not isinstance(row, dict):
                raise DataError("the line is not a JSON object")
            if "custom_id" not in row:
                row = tables.normalized(row)
            own = row.get("custom_id", row.get("id"))
            name = name if own in (None, "") else str(own)
            return _openai(name, row) if "custom_id" in row else self._plain(name, row)
        except (LlavaError, ValueError, RecursionError) as error:
            reason = error if isinstance(error, LlavaError) else DataError(f"not JSON: {error}")
            return Sample(name, openai=isinstance(row, dict) and "custom_id" in row, error=reason)

    def _plain(self, name: str, row: JsonRow) -> Sample:
        if "messages" in row:
            messages = _list(row["messages"], "messages")
            return Sample(name, [_resolve_paths(message, self._folder) for message in messages])
        question = next((row[key] for key in tables.QUESTIONS if row.get(key)), self.question)
        if not isinstance(question, str):
            raise DataError(
                "the sample has neither a question nor messages; --question is the question of "
                f"samples without one. Its fields: {', '.join(map(str, row))}"
            )
        media = [media_part(file, self._folder) for file in tables.media(row)]
        pieces = question.split("<image>")
        if len(pieces) == 1:
            return Sample(
                name, [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]
            )
        if len(pieces) != len(media) + 1:
            raise DataError(
                f"the question has {len(pieces) - 1} <image>, but the sample has {len(media)} files"
            )
        mixed = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
        for file, piece in zip(media, pieces[1:], strict=True):
            mixed += [file, {"type": "text", "text": piece}] if piece else [file]
        return Sample(name, [{"role": "user", "content": mixed}])


def _openai(name: str, row: JsonRow) -> Sample:
    """A line of OpenAI's batch format."""
    body = row.get("body")
    endpoint = row.get("method", "POST"), row.get("url")
    if endpoint != ("POST", "/v1/chat/completions") or not isinstance(body, dict):
        raise DataError(
            "a line of OpenAI's batch format has the method POST, the url /v1/chat/completions "
            "and a body"
        )
    unknown = [
        key
        for key, value in body.items()
        if key not in (*openai_body.OPTIONS, *IGNORED_KEYS)
        and (key, value) not in (("n", 1), ("stream", False))
    ]
    if unknown:
        raise OptionError(f"the body has {', '.join(unknown)}, which is not supported here")
    return Sample(
        name,
        _list(body.get("messages"), "messages"),
        openai_body.options(body),
        openai=True,
        model=str(body.get("model") or ""),
    )


def media_part(file: str | Embedded, folder: Path) -> dict[str, Any]:
    """The message part of a path (relative to `folder`), of a URL or of bytes."""
    if isinstance(file, Embedded):
        kind = "video" if folders.is_video(file.name, file.data) else "image"
        return {"type": kind, kind: file.data}
    if re.match(r"https?://|data:", file):
        return {"type": "media", "url": file}
    return {"type": "media", "path": str(folder / file)}


def _resolve_paths(message: Any, folder: Path) -> Any:
    """A message whose relative paths begin at the source's folder, like those in columns."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = [
        {**p, "path": str(folder / p["path"])}
        if isinstance(p, dict) and isinstance(p.get("path"), str)
        else p
        for p in message["content"]
    ]
    return {**message, "content": parts}


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{name} is not a list")
    return value


def _open(path: Path) -> tuple[RowSource, list[tuple[str, str]], str]:
    """The rows of a path, its files that are not samples, and a text that changes with them."""
    if path.is_dir():
        if tars := sorted(path.glob("*.tar"), key=folders.natural):
            others = [p for p in sorted(path.iterdir(), key=folders.natural) if p not in tars]
            shards = Shards(tars)
            ignored = [(p.name, "next to .tar shards only these are read") for p in others]
            return shards, [*ignored, *shards.skipped], shards.digest
        rows, skipped = folders.rows(path)
        return RowList(rows), skipped, repr(rows)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        table = RowList(tables.read_csv(path))
        return table, [], repr(table)
    if suffix == ".tar":
        shards = Shards([path])
        return shards, shards.skipped, shards.digest
    if suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path} is neither .jsonl, .csv, .tsv, .parquet or .tar nor a folder")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()
    return (JsonLines(path) if suffix == ".jsonl" else Parquet(path)), [], digest


def media_keys(sample: Sample) -> list[str]:
    """A hash of where each media file of a sample comes from."""
    parts = [
        p
        for m in sample.messages
        if isinstance(m, Mapping) and isinstance(m.get("content"), list)
        for p in m["content"]
    ]
    named = (p for p in parts if isinstance(p, Mapping) and p.get("type") != "text")
    return [
        hashlib.blake2b(
            json.dumps(p, sort_keys=True, default=str).encode(), digest_size=8
        ).hexdigest()
        for p in named
    ]
