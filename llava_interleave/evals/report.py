"""One HTML file with everything of a run: how it was made, the means, and every example with its pictures and its judgement."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from ..errors import MediaError
from ..journal import JsonRow
from .stats import Line
from .task import Example, Messages, Task

SIDE, FRAMES = 200, 4
"""Pixels of a picture's longer side in the report, and frames shown of a video."""
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}}
table{{border-collapse:collapse;margin:1rem 0}}td,th{{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #8884}}
td:first-child,th:first-child{{text-align:left}}article{{border:1px solid #8884;border-left:.4rem solid #c33;padding:.5rem 1rem;
margin:.7rem 0}}article.right{{border-left-color:#393}}article.open{{border-left-color:#999}}img{{margin:.2rem;max-width:100%}}
pre{{white-space:pre-wrap;margin:.3rem 0;font:inherit}}small{{opacity:.7}}#wrong:checked~article.right{{display:none}}
</style><h1>{title}</h1>
"""


def write(
    path: Path, task: Task, rows: Sequence[JsonRow], lines: Sequence[Line], about: dict[str, Any]
) -> None:
    """Write the report; the file appears when it is complete."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with draft.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(PAGE.format(title=escape(f"{task.name}: {about.get('model', '')}")))
            file.writelines(_head(task, lines, about))
            for example, row in zip(task.examples, rows, strict=True):
                file.write(_article(example, row))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _head(task: Task, lines: Sequence[Line], about: dict[str, Any]) -> Iterator[str]:
    yield table(("made with", ""), [(key, str(value)) for key, value in about.items()])
    papers = list(task.paper)
    cells = [
        (
            line.name,
            f"{line.mean:.2%}",
            f"{line.low:.1%} to {line.high:.1%}",
            str(line.asked),
            str(line.failed),
        )
        for line in lines
    ]
    published = [
        [f"{task.paper[m][line.name]:.1f}" if line.name in task.paper[m] else "" for m in papers]
        for line in lines
    ]
    columns = ("", "mean", "95 % interval", "examples", "not answered", *papers)
    yield table(
        columns, [(*cell, *figures) for cell, figures in zip(cells, published, strict=True)]
    )
    if task.paper:
        yield f"<p>{escape(', '.join(papers))}: published figures in percent, made with {escape(task.pipeline)}.</p>"
    if task.faults:
        items = "".join(f"<li>{escape(fault)}" for fault in task.faults)
        yield f"<details><summary>{len(task.faults)} broken samples were left out</summary><ul>{items}</ul></details>"
    yield '<input type="checkbox" id="wrong"><label for="wrong"> hide what is right</label>\n'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in HTML."""
    head = "".join(f"<th>{escape(name)}" for name in columns)
    return (
        f"<table><tr>{head}"
        + "".join("<tr>" + "".join(f"<td>{escape(c)}" for c in row) for row in rows)
        + "</table>\n"
    )


def _article(example: Example, row: JsonRow) -> str:
    score = row["score"]
    mark = "open" if score is None else "right" if score == 1 else "wrong"
    with TemporaryDirectory() as folder:
        shown = "".join(_pictures(example.ask(Path(folder))))
    judged = "not counted" if score is None else f"{score:.3g}"
    said = (
        f"<i>{escape(row['error'])}</i>" if row["error"] else f"<pre>{escape(row['answer'])}</pre>"
    )
    return (
        f'<article class="{mark}"><small>{escape(row["id"])} {escape(row["kind"])}</small>'
        f"<pre>{escape(row['question'])}</pre>{shown}<table><tr><th>truth<td><pre>{escape(row['truth'])}</pre><tr><th>answer<td>{said}<tr><th>score<td>{judged}</table></article>\n"
    )


def _pictures(messages: Messages) -> Iterator[str]:
    """The pictures of messages as small `<img>`; a few frames of a video; a note in place of one that cannot be read."""
    from ..processing.loader import Loader
    from ..processing.video import FrameSampling

    loader = Loader()
    for part in (
        p
        for message in messages
        if not isinstance(message["content"], str)
        for p in message["content"]
    ):
        try:
            if part["type"] == "image":
                yield _img(loader.image(part["path"]))
            elif part["type"] == "views":
                yield from (
                    _img(loader.image(source), name) for name, source in part["views"].items()
                )
            elif part["type"] == "video":
                yield from (
                    _img(frame)
                    for frame in loader.video(
                        part.get("path") or part["video"], FrameSampling(frames=FRAMES)
                    ).frames
                )
        except MediaError as error:
            yield f"<i>{escape(str(error))}</i>"


def _img(picture: Image.Image, name: str = "") -> str:
    picture.thumbnail((SIDE, SIDE))
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(name)}" title="{escape(name)}" src="data:image/jpeg;base64,{data}">'
