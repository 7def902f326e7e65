"""A run as one HTML page: curves, what was answered over time, settings. Needs no script and no other file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..errors import DataError

Points = list[tuple[int, float]]
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 200, 64, 24, 10
"""Of a curve, and of its margins."""
MOST = 400
"""Points of a curve; more are averaged."""
CURVES = (
    ("Loss", "loss"), ("Right", "right"), ("Learning rate", "lr"), ("Norm of the gradient", "norm"),
    ("Tokens a second", "tokens"), ("Images a second", "crops"), ("MFU", "mfu"), ("Peak memory, GiB", "memory"),
)  # fmt: skip
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}}
table{{border-collapse:collapse;margin:.5rem 0}}td,th{{padding:.2rem .8rem;text-align:left;border-bottom:1px solid #8884;
vertical-align:top}}pre{{white-space:pre-wrap;font:inherit;margin:.3rem 0}}pre.code{{font-family:ui-monospace,monospace}}
.curves{{display:grid;grid-template-columns:repeat(auto-fit,minmax(22rem,1fr));gap:1rem}}figure{{margin:0}}
svg{{width:100%;height:auto}}text{{font:11px system-ui,sans-serif;fill:currentColor}}path{{fill:none;stroke-width:1.5}}
.axis{{stroke:#8886}}.train{{stroke:#57c}}.held{{stroke:#d52;fill:#d52}}path.held{{fill:none}}article{{border:1px solid #8884;
padding:.5rem 1rem;margin:.7rem 0}}img{{margin:.2rem;max-width:100%}}small{{opacity:.7}}</style></head><body>
<h1>{title}</h1>
"""


def write(folder: Path, page: Path) -> None:
    """Write the page of the run in `folder`; the file appears when it is whole. Raises DataError where there is no run."""
    try:
        lines = _lines(folder / "log.jsonl")
        settings = (folder / "config.toml").read_text("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no run of llava train: {error}") from error
    draft = page.with_name(f".{page.name}.{os.getpid()}")
    try:
        draft.write_text(
            "".join(_parts(folder, lines, settings)), "utf-8", errors="backslashreplace"
        )
        draft.replace(page)
    finally:
        draft.unlink(missing_ok=True)


def _parts(folder: Path, lines: Sequence[dict[str, Any]], settings: str) -> Iterator[str]:
    yield PAGE.format(title=escape(f"Training run {folder.absolute().name}"))
    train = {
        line["step"]: line for line in lines if "loss" in line
    }  # of a step that was done again, the last
    held = {line["step"]: line["held_out"] for line in lines if "held_out" in line}
    if train:
        last = train[max(train)]
        yield f"<p>{max(train):,} steps, loss {last['loss']:.4f}, {last['right']:.1%} right</p>"
    if held:
        rows = [
            (f"{step:,}", *(f"{value:.4f}" for value in found.values()))
            for step, found in sorted(held.items())
        ]
        best = min(held, key=lambda step: held[step]["loss"])
        yield f"<p>Held out, the loss was lowest after step {best:,}: {held[best]['loss']:.4f}</p>"
    yield '<div class="curves">\n'
    for title, name in CURVES:
        points = sorted((step, line[name]) for step, line in train.items() if name in line)
        measured = sorted((step, found[name]) for step, found in held.items() if name in found)
        if points or measured:
            yield _curve(title, _thinned(points), measured)
    yield "</div>\n<p><small>Blue: in training. Red: held out.</small></p>\n"
    if held:
        yield _table(("step", *next(iter(held.values()))), rows)
    yield from _answers(folder)
    yield f'<h2>Settings</h2><pre class="code">{escape(settings)}</pre></body></html>\n'


def _lines(path: Path) -> list[dict[str, Any]]:
    """What is written in a file of lines; the last one may just be being written, and is whole only with its end."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def _thinned(points: Points) -> Points:
    """At most `MOST` points, each the mean of neighbours, at the last one's step."""
    size = -(-len(points) // MOST) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _curve(title: str, points: Points, measured: Points) -> str:
    """An SVG of one quantity, none below nought, by step: a line of what was logged, one with dots of what was measured."""
    end, high = (max(both) for both in zip(*points, *measured, strict=True))
    high = high or 1.0

    def at(step: int, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - TOP) * step / max(1, end)
        return round(x, 1), round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / high, 1)

    drawn = []
    for share in (0.0, 0.5, 1.0):
        x, y = at(round(share * end), share * high)
        told = f"{share * high:,.0f}" if high >= 1000 else f"{share * high:.3g}"
        drawn.append(f'<path class="axis" d="M{LEFT} {y}H{WIDTH - TOP}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{told}</text>')
        anchor = "start" if share == 0 else "middle" if share < 1 else "end"
        drawn.append(
            f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="{anchor}">{round(share * end):,}</text>'
        )
    for kind, line in (("train", points), ("held", measured)):
        if line:
            way = "L".join("{} {}".format(*at(*point)) for point in line)
            drawn.append(f'<path class="{kind}" d="M{way}"/>')
    for step, value in measured:
        x, y = at(step, value)
        drawn.append(
            f'<circle class="held" cx="{x}" cy="{y}" r="3"><title>step {step:,}: {value:.4f}</title></circle>'
        )
    name = escape(title)
    return (
        f'<figure><figcaption>{name}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name} by step">'
        f"{''.join(drawn)}</svg></figure>\n"
    )


def _answers(folder: Path) -> Iterator[str]:
    """Each question with its pictures, its truth, and every answer that differs from the one before."""
    if not (folder / "answers.jsonl").is_file():
        return
    yield "<h2>Answers over time</h2>\n"
    said = sorted(
        {line["step"]: line["answers"] for line in _lines(folder / "answers.jsonl")}.items()
    )
    for number, asked in enumerate(json.loads((folder / "questions.json").read_text("utf-8"))):
        told = [(step, answers[number]) for step, answers in said if number < len(answers)]
        rows = [
            (f"{step:,}", answer)
            for i, (step, answer) in enumerate(told)
            if not i or answer != told[i - 1][1]
        ]
        shown = "".join(f'<img alt="" src="{escape(picture)}">' for picture in asked["pictures"])
        yield f"<article><small>{escape(asked['name'])}</small><pre>{escape(asked['question'])}</pre>{shown}"
        yield _table(("from step", "answer"), [*rows, ("truth", asked["truth"])]) + "</article>\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}" for name in columns)
    return (
        f"<table><tr>{head}"
        + "".join("<tr>" + "".join(f"<td>{escape(c)}" for c in row) for row in rows)
        + "</table>\n"
    )
