"""What a benchmark is: examples, each with what to ask and how to judge the answer, and which means are reported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, LlavaError
from ..journal import JsonRow
from ..parquet import Parquet
from .scoring import Judge

ContentPart = dict[str, Any]
Messages = list[ContentPart]
Media = Sequence[ContentPart] | Callable[[Path], Sequence[ContentPart]]
"""The pictures and videos of a question, or what writes them into a folder when it is asked."""
Answerer = Callable[[Sequence[Messages]], Sequence[str | LlavaError]]
"""Answers several conversations; one that cannot be answered gets the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question.

    group: the data set, scenario or category whose mean it goes into. ask: the messages; files may be drawn into the folder.
    follows: the id of the turn before, whose conversation this one continues. kind: a finer name, for tables.
    """

    id: str
    group: str
    ask: Callable[[Path], Messages]
    question: str
    truth: str
    judge: Judge
    follows: str = ""
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a benchmark reports beside means. count: what a row adds to its sums. of: shares computed from the sums, by name."""

    count: Callable[[JsonRow], Sequence[float]]
    of: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A benchmark.

    categories: means of the means of groups. average: the categories (without any: the groups) whose mean is the last line.
    paper: published figures in percent, by model and then by category or group; pipeline: how those were made.
    faults: samples that are broken and left out, with reasons. data: a hash of the files that were read. figures: of every
    group, and of all examples where there are several groups. note: of its options, for a table's title. fixed_frames: its
    questions say how many frames of a video are used.
    """

    name: str
    examples: Sequence[Example]
    max_new_tokens: int
    preset: str = "interleave"
    categories: Mapping[str, Sequence[str]] = field(default_factory=dict)
    average: Sequence[str] = ()
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    pipeline: str = ""
    faults: Sequence[str] = ()
    data: str = ""
    figures: Figures | None = None
    note: str = ""
    fixed_frames: bool = False

    def but(self, **changes: Any) -> Task:
        """The task with other values of fields; of a subclass it is a plain Task."""
        values = {one.name: getattr(self, one.name) for one in fields(Task)}
        return Task(**(values | changes))


def find(path: Path, fetch: str) -> Path:
    """The path, if it is there; else a `DataError` that says what to fetch. Nothing is ever downloaded here."""
    if not path.exists():
        raise DataError(
            f"{path} is not there: {fetch}. Nothing is downloaded by itself; --data names another folder"
        )
    return path


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises `DataError`."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error


def read_lines(path: Path) -> list[Any]:
    """What the lines of a JSONL file hold. Raises `DataError` naming the line."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number} of {path} is no JSON: {error}") from error
    return rows


def digest(*paths: Path) -> str:
    """A hash of files, 32 hex digits."""
    state = hashlib.blake2b(digest_size=16)
    for path in paths:
        state.update(hashlib.blake2b(path.read_bytes()).digest())
    return state.hexdigest()


def asked(text: str, pictures: Sequence[Path]) -> list[ContentPart]:
    """The content of a turn: `<image>` in the text becomes the pictures in order; as many as there are (else an assert)."""
    assert text.count("<image>") == len(pictures)
    return placed(text, [{"type": "image", "path": str(path)} for path in pictures])


def placed(text: str, media: Sequence[ContentPart]) -> list[ContentPart]:
    """Text with media where it says `<image>`; before it where it says so never, or another number of times."""
    pieces = text.split("<image>")
    if len(pieces) != len(media) + 1:
        return [*media, {"type": "text", "text": text}]
    parts: list[ContentPart] = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
    for one, piece in zip(media, pieces[1:], strict=True):
        parts += [one, {"type": "text", "text": piece}] if piece else [one]
    return parts


def example(
    name: str, group: str, media: Media, text: str, truth: str, judge: Judge, kind: str = ""
) -> Example:
    """One question in one turn."""

    def ask(folder: Path) -> Messages:
        return [
            {"role": "user", "content": placed(text, media(folder) if callable(media) else media)}
        ]

    return Example(
        id=name, group=group, kind=kind, ask=ask, question=text, truth=truth, judge=judge
    )


def embedded(table: Parquet, number: int, *columns: str) -> Callable[[Path], list[ContentPart]]:
    """The pictures in columns of a row, or in lists of them, as files; those that are not there are left out."""

    def write(folder: Path) -> list[ContentPart]:
        row = table.row(number, columns)
        cells = [
            cell
            for name in columns
            for cell in (row[name] if isinstance(row[name], list) else [row[name]])
            if cell
        ]
        paths = []
        for index, cell in enumerate(cells):
            suffix = ".png" if cell["bytes"].startswith(b"\x89PNG") else ".jpg"
            paths.append(folder / f"{table.path.stem}-{number}-{index}{suffix}")
            paths[-1].write_bytes(cell["bytes"])
        return [{"type": "image", "path": str(path)} for path in paths]

    return write
