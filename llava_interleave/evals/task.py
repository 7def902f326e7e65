"""A benchmark: examples with messages and a scorer, and the means that are reported."""

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
from .scoring import Scorer

ContentPart = dict[str, Any]
Messages = list[ContentPart]
Media = Sequence[ContentPart] | Callable[[Path], Sequence[ContentPart]]
"""The images and videos of a question, or a function that writes them into a folder first."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer with its log-probability, the sum over its tokens.

    yes: the probability of yes against no at the token that says one of them, else at its first
    token; None where neither is probable there.
    """

    text: str
    logprob: float | None = None
    yes: float | None = None


AnswerFn = Callable[[Sequence[Messages]], Sequence[str | Reply | LlavaError]]
"""Conversations -> their answers; an error for one that cannot be answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question.

    group: the data set, scenario or category whose mean it goes into. ask: its messages; it may
    write files into the folder. follows: id of the previous turn, whose conversation this one
    continues. kind: a finer name, for tables. options: of a multiple-choice question, without their
    letters. references: all of them, where `truth` is several.
    """

    id: str
    group: str
    ask: Callable[[Path], Messages]
    question: str
    truth: str
    scorer: Scorer
    follows: str = ""
    kind: str = ""
    options: Sequence[str] = ()
    references: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class AggregateMetrics:
    """Metrics of sums over rows, such as F1. count: the summands of a row. of: metrics by name,
    computed from the sums.
    """

    count: Callable[[JsonRow], Sequence[float]]
    of: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A benchmark.

    categories: means of the means of groups. average: the categories (without any: the groups)
    whose mean is the last line. paper: published figures in percent, by model and then by category
    or group; pipeline: how those were made. faults: samples that are broken and left out, with
    reasons. data: a hash of the files that were read. metrics: of every group, and of all examples
    where there are several groups. note: of its options, for a table's title. fixed_frames: its
    questions say how many frames of a video are used. measures: further means of all rows. grid:
    groups as a table for the report, by the names of its rows and columns. baselines: groups that
    do not count for the calibration. logprobs: ask for log-probabilities.
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
    metrics: AggregateMetrics | None = None
    note: str = ""
    fixed_frames: bool = False
    measures: Callable[[Sequence[JsonRow]], Sequence[Any]] | None = None
    grid: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    baselines: Sequence[str] = ()
    logprobs: bool = False

    def but(self, **changes: Any) -> Task:
        """The task with other values of fields; of a subclass it is a plain Task."""
        values = {one.name: getattr(self, one.name) for one in fields(Task)}
        return Task(**(values | changes))


def require_file(path: Path, fetch: str) -> Path:
    """The path if it exists, else a `DataError` that says what to fetch. Nothing is downloaded."""
    if not path.exists():
        raise DataError(
            f"{path} does not exist: {fetch}. Nothing is downloaded; --data names another folder"
        )
    return path


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises `DataError`."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error


def read_lines(path: Path) -> list[Any]:
    """The values in a JSONL file. Raises `DataError` naming the line."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number} of {path} is not JSON: {error}") from error
    return rows


def digest(*paths: Path) -> str:
    """A hash of files, 32 hex digits."""
    state = hashlib.blake2b(digest_size=16)
    for path in paths:
        state.update(hashlib.blake2b(path.read_bytes()).digest())
    return state.hexdigest()


def with_images(text: str, images: Sequence[Path]) -> list[ContentPart]:
    """The content of a turn: each `<image>` in the text becomes an image; the counts must be equal
    (assert).
    """
    assert text.count("<image>") == len(images)
    return place_media(text, [{"type": "image", "path": str(path)} for path in images])


def place_media(text: str, media: Sequence[ContentPart]) -> list[ContentPart]:
    """Text with media in the place of `<image>`; all before the text where the counts differ."""
    pieces = text.split("<image>")
    if len(pieces) != len(media) + 1:
        return [*media, {"type": "text", "text": text}]
    parts: list[ContentPart] = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
    for item, piece in zip(media, pieces[1:], strict=True):
        parts += [item, {"type": "text", "text": piece}] if piece else [item]
    return parts


def example(
    name: str,
    group: str,
    media: Media,
    text: str,
    truth: str,
    scorer: Scorer,
    kind: str = "",
    options: Sequence[str] = (),
    references: Sequence[str] = (),
) -> Example:
    """One question in one turn."""

    def ask(folder: Path) -> Messages:
        return [
            {
                "role": "user",
                "content": place_media(text, media(folder) if callable(media) else media),
            }
        ]

    return Example(
        id=name,
        group=group,
        kind=kind,
        ask=ask,
        question=text,
        truth=truth,
        scorer=scorer,
        options=options,
        references=references,
    )


def embedded_images(
    table: Parquet, number: int, *columns: str
) -> Callable[[Path], list[ContentPart]]:
    """Write the images in columns of a row, or in lists there, as files; empty cells
    are skipped.
    """

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
