"""One HTML file with everything of a run: settings, means, and every example with its images and
score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import reports
from ..errors import MediaError
from ..journal import JsonRow
from .calibration import calibrations
from .stats import Mean
from .task import Messages, Task

SIDE, FRAMES = 200, 4
"""Pixels of an image's longer side in the report, and frames shown of a video."""


def write(
    path: Path, task: Task, rows: Sequence[JsonRow], means: Sequence[Mean], about: dict[str, Any]
) -> None:
    """Write the report; the file appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"{task.name}: {about.get('model', '')}"
    data = {"about": about, "task": task, "examples": _examples(task, rows)}
    first: dict[str, str] = {}  # example of each group
    for row in rows:
        first.setdefault(row["group"], row["id"])
    data["first"] = first
    data["mean_columns"], data["mean_rows"] = mean_table(task, means)
    rows_of_grid = sorted(task.grid.values(), key=len, reverse=True)
    data["places"] = list(dict.fromkeys(place for row in rows_of_grid for place in row))
    data["calibrations"] = calibrations(rows, task.baselines)
    data["values"] = {mean.name: mean.mean for mean in means if mean.kind == "group"}
    reports.write(path, "evals.html", title=title, **data)


def mean_table(task: Task, means: Sequence[Mean]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the means with their intervals, next to the published ones."""
    rows = []
    for mean in means:
        published = [
            f"{figures[mean.name]:.1f}" if mean.name in figures else ""
            for figures in task.paper.values()
        ]
        own = [
            f"{mean.mean:.2%}",
            f"{mean.low:.1%} to {mean.high:.1%}",
            str(mean.examples),
            str(mean.failed),
        ]
        rows.append([mean.name, *own, *published])
    return ["", "mean", "95 % interval", "examples", "failed", *task.paper], rows


def _examples(
    task: Task, rows: Sequence[JsonRow]
) -> Iterator[tuple[JsonRow, list[tuple[str, str, str]]]]:
    for example, row in zip(task.examples, rows, strict=True):
        with TemporaryDirectory() as folder:
            images = list(_images(example.ask(Path(folder))))
        yield row, images


def _images(messages: Messages) -> Iterator[tuple[str, str, str]]:
    """Name, data URL and error of each image of messages; of a video a few frames."""
    from ..processing.loader import Loader
    from ..processing.video import FrameSampling

    loader = Loader()
    for part in (p for m in messages if not isinstance(m["content"], str) for p in m["content"]):
        try:
            images = []
            if part["type"] == "image":
                images = [("", loader.image(part["path"]))]
            elif part["type"] == "views":
                images = [(name, loader.image(source)) for name, source in part["views"].items()]
            elif part["type"] == "video":
                source = part.get("path") or part["video"]
                frames = loader.video(source, FrameSampling(frames=FRAMES)).frames
                images = [("", frame) for frame in frames]
            yield from ((name, reports.data_url(i, SIDE, quality=80), "") for name, i in images)
        except MediaError as error:
            yield "", "", str(error)
