"""The samples of a file, of shards or of a folder, one at a time. One that cannot be read says why,
and the others go on.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from ..errors import DataError, LlavaError, OptionError
from ..parquet import Parquet
from .webdataset import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Embedded, Shards

MEDIA = re.compile(r"(image|video)\w*")
"""Names of columns and keys that hold a file, or a list of them."""
BODY = {
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens",
    "temperature": "temperature", "top_p": "top_p",
    "seed": "seed", "stop": "stop", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}  # fmt: skip
"""OpenAI's names of options -> ours."""
IGNORED_KEYS = ("model", "messages", "user", "metadata", "store", "service_tier")
"""What an OpenAI body may have besides, and does not change the answer."""

JsonRow = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """What to ask.

    messages: a conversation, or what was made of it elsewhere. options: what its row says of them.
    openai: its row is in OpenAI's batch format, and so is its answer's; model: the one that it
    names.
    """

    id: str
    messages: Any = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    openai: bool = False
    model: str = ""
    error: LlavaError | None = None


class RowSource(Protocol):
    """What a source is made of: rows by number."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Any: ...


class Lines:
    """The lines of a .jsonl file that are not empty. Only their places are kept."""

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
            return json.loads(file.readline())


class Listed(list[JsonRow]):
    """Rows that are kept: those of a table or a folder, without the pictures."""

    def row(self, index: int) -> JsonRow:
        return self[index]


class Source:
    """The samples of a .jsonl, .csv, .parquet or .tar file, or of a folder."""

    def __init__(self, path: Path, question: str | None = None) -> None:
        self.path, self.question = path, question
        if not path.exists():
            raise DataError(f"{path} is not there")
        self._rows, seen = _rows(path)
        if not len(self):
            raise DataError(f"{path} has no samples")
        self.digest = hashlib.blake2b(
            f"{path.suffix} {question} {seen}".encode(), digest_size=16
        ).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def media(self, index: int) -> list[str]:
        """What tells a sample's media apart. Those that lie within shards or tables are nobody
        else's, and are not looked at.
        """
        if isinstance(self._rows, Shards):
            return []
        if isinstance(self._rows, Parquet) and any(
            "binary" in kind for kind in self._rows.columns.values()
        ):
            return []
        return media_of(self.sample(index))

    def sample(self, index: int) -> Sample:
        """A sample; one that cannot be read has the reason in `error`."""
        name = self._rows.key(index) if isinstance(self._rows, Shards) else str(index + 1)
        row: Any = None
        try:
            row = self._rows.row(index)
            if not isinstance(row, dict):
                raise DataError("the line holds no JSON object")
            given = row.get("custom_id", row.get("id"))
            name = name if given is None else str(given)
            return self._openai(name, row) if "custom_id" in row else self._plain(name, row)
        except (LlavaError, ValueError, RecursionError) as error:
            found = error if isinstance(error, LlavaError) else DataError(f"it is no JSON: {error}")
            return Sample(name, openai=isinstance(row, dict) and "custom_id" in row, error=found)

    def _plain(self, name: str, row: JsonRow) -> Sample:
        if "messages" in row:
            return Sample(
                name,
                [_placed(message, self.path) for message in _list(row["messages"], "messages")],
            )
        question = row.get("question") or self.question
        if not isinstance(question, str):
            raise DataError(
                "the sample has neither a question nor messages; --question is asked of all that "
                "have none"
            )
        files: list[Any] = []
        for key, value in row.items():
            if key is not None and MEDIA.fullmatch(key) and value not in (None, ""):
                files += value if isinstance(value, list) else [value]
        files = [_embedded(file) for file in files]
        if None in row:  # what csv.DictReader calls the cells beyond the header
            raise DataError(f"the row has more cells than the header has names: {row[None]}")  # type: ignore[index]
        media = [
            part(file, self.path if self.path.is_dir() else self.path.parent) for file in files
        ]
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

    def _openai(self, name: str, row: JsonRow) -> Sample:
        body = row.get("body")
        if (row.get("method", "POST"), row.get("url")) != (
            "POST",
            "/v1/chat/completions",
        ) or not isinstance(body, dict):
            raise DataError(
                "a line of OpenAI's batch format has the method POST, the url "
                "/v1/chat/completions and a body"
            )
        if unknown := [
            key
            for key in body
            if key not in (*BODY, *IGNORED_KEYS)
            and (key, body[key]) not in (("n", 1), ("stream", False))
        ]:
            raise OptionError(f"the body has {', '.join(unknown)}, which is not offered here")
        options = {
            BODY[key]: value for key, value in body.items() if key in BODY and value is not None
        }
        if wrong := [
            name
            for name in options
            if name != "stop" and not isinstance(options[name], int | float)
        ]:
            raise OptionError(f"{', '.join(wrong)} must be numbers")
        if isinstance(options.get("stop"), list):
            options["stop"] = tuple(options["stop"])
        return Sample(
            name,
            _list(body.get("messages"), "messages"),
            options,
            openai=True,
            model=str(body.get("model") or ""),
        )


def _embedded(file: Any) -> str | Embedded:
    """A path or URL, or a file that the row has in itself, as Hugging Face's `datasets`
    writes it.
    """
    if isinstance(file, dict) and isinstance(file.get("bytes"), bytes):
        return Embedded(str(file.get("path") or ""), file["bytes"])
    if not isinstance(file, str | Embedded):
        raise DataError(
            "images and videos are given as texts (paths or URLs), or in a Parquet file as "
            "{'bytes', 'path'}"
        )
    return file


def part(file: str | Embedded, folder: Path) -> dict[str, Any]:
    """The message part of a path, below `folder` unless it is absolute, of a URL, or of the bytes
    themselves.
    """
    if isinstance(file, Embedded):
        kind = "video" if file.name.lower().endswith(VIDEO_SUFFIXES) else "image"
        return {"type": kind, kind: file.data}
    if re.match(r"https?://|data:", file):
        film = file.startswith("data:video/") or urlsplit(file).path.lower().endswith(
            VIDEO_SUFFIXES
        )
        return {"type": "video" if film else "image", "url": file}
    path = folder / file
    return {
        "type": "video" if path.suffix.lower() in VIDEO_SUFFIXES or path.is_dir() else "image",
        "path": str(path),
    }


def _placed(message: Any, source: Path) -> Any:
    """A message whose relative paths begin at the file's folder, as those of columns do."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = [
        {**p, "path": str(source.parent / p["path"])}
        if isinstance(p, dict) and isinstance(p.get("path"), str)
        else p
        for p in message["content"]
    ]
    return {**message, "content": parts}


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{name} is no list")
    return value


def _rows(path: Path) -> tuple[RowSource, str]:
    """The rows of a path, and what changes whenever they do."""
    if path.is_dir():
        if tars := sorted(path.glob("*.tar"), key=_natural):
            shards = Shards(tars)
            return shards, shards.digest
        rows = _folder(path)
        return rows, repr(rows)
    if path.suffix == ".csv":
        rows = _csv(path)
        return rows, repr(rows)
    if path.suffix == ".tar":
        shards = Shards([path])
        return shards, shards.digest
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path} is neither .jsonl, .csv, .parquet or .tar nor a folder")
    with path.open("rb") as file:
        seen = hashlib.file_digest(file, "blake2b").hexdigest()
    return (Lines(path) if path.suffix == ".jsonl" else Parquet(path)), seen


def _csv(path: Path) -> Listed:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return Listed(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV in UTF-8: {error}") from error


def _folder(folder: Path) -> Listed:
    """A sample a file, and one a sub-folder with all its pictures, in natural order."""
    rows = Listed()
    for path in sorted(folder.iterdir(), key=_natural):
        if path.is_dir():
            files = sorted(
                (
                    f
                    for f in path.iterdir()
                    if f.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
                ),
                key=_natural,
            )
            rows += (
                [{"id": path.name, "images": [f"{path.name}/{file.name}" for file in files]}]
                if files
                else []
            )
        elif path.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
            rows.append({"id": path.name, "images": [path.name]})
    return rows


def _natural(path: Path) -> list[tuple[int, str]]:
    return [
        (int(piece), "") if piece.isdigit() else (-1, piece)
        for piece in re.split(r"(\d+)", path.name)
    ]


def media_of(sample: Sample) -> list[str]:
    """What tells a sample's media apart: a hash of where each comes from."""
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
