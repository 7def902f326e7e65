"""A training run as one HTML page: curves, answers over time, settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import reports
from ..errors import DataError

Points = list[tuple[int, float]]
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 220, 76, 28, 14
"""Of a curve, and of its margins."""
MOST = 400
"""Points of a curve; more are averaged."""
CURVES = (
    ("Loss", "loss"), ("Accuracy", "accuracy"), ("Learning rate", "learning_rate"),
    ("Gradient norm", "grad_norm"),
    ("Tokens a second", "tokens_per_second"),
    ("Images a second", "images_per_second"), ("MFU", "mfu"), ("Peak memory, GiB", "memory_gib"),
)  # fmt: skip


def write(folder: Path, page: Path) -> None:
    """Write the page of the run in `folder`; the file appears when it is complete.

    Raises DataError where there is no run.
    """
    try:
        lines = _lines(folder / "log.jsonl")
        settings = (folder / "config.toml").read_text("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no run of llava train: {error}") from error
    # Of a step that was done again, the last line counts.
    train = {line["step"]: line for line in lines if line.get("loss") is not None}
    held_out = {line["step"]: line["held_out"] for line in lines if "held_out" in line}
    losses = {step: m["loss"] for step, m in held_out.items() if m.get("loss") is not None}
    best = min(losses, key=losses.__getitem__, default=None)
    reports.write(
        page,
        "train.html",
        title=f"Training run {folder.absolute().name}",
        last=train[max(train)] if train else None,
        best=None if best is None else (best, held_out[best]["loss"]),
        curves=list(_curves(train, held_out)),
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        margin=TOP,
        held_out=[
            (
                f"{step:,}",
                *("NaN" if value is None else f"{value:.4f}" for value in metrics.values()),
            )
            for step, metrics in sorted(held_out.items())
        ],
        held_out_columns=("step", *next(iter(held_out.values()), ())),
        answers=list(_answers(folder)),
        settings=settings,
    )


def _curves(
    train: Mapping[int, Mapping[str, float]], held_out: Mapping[int, Mapping[str, float]]
) -> Iterator[dict[str, Any]]:
    known = {name for _, name in CURVES}
    own = {name for metrics in held_out.values() for name in metrics if "/" not in name} - known
    for title, name in (*CURVES, *((name, name) for name in sorted(own))):
        points = sorted(
            (step, line[name]) for step, line in train.items() if line.get(name) is not None
        )
        dots = sorted(
            (step, found[name]) for step, found in held_out.items() if found.get(name) is not None
        )
        if points or dots:
            yield _curve(title, _thinned(points), dots)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file of JSON lines; the last one may still be in writing."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def _thinned(points: Points) -> Points:
    """At most `MOST` points, each the mean of neighbours, at the last one's step."""
    size = -(-len(points) // MOST) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _curve(title: str, points: Points, measured: Points) -> dict[str, Any]:
    """One quantity, from 0 on, by step: a line of logged values, and dots of held-out ones."""
    end, high = (max(both) for both in zip(*points, *measured, strict=True))
    high = high or 1.0

    def at(step: int, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - TOP) * step / max(1, end)
        return round(x, 1), round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / high, 1)

    ticks = []
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x, y = at(round(share * end), share * high)
        form = ",.0f" if high >= 1000 else ".3g" if high >= 0.001 else ".1e"
        value = f"{share * high:{form}}" if share else "0"
        ticks.append(
            {"x": x, "y": y, "value": value, "step": f"{round(share * end):,}", "anchor": anchor}
        )
    lines = (("train", points), ("held", measured))
    return {
        "title": title,
        "ticks": ticks,
        "lines": [(kind, [at(*point) for point in line]) for kind, line in lines if line],
        "dots": [(*at(*point), *point) for point in measured],
    }


def _answers(folder: Path) -> Iterator[tuple[dict[str, Any], list[tuple[str, str]]]]:
    """Each question with every answer that differs from the one before, and the
    reference answer.
    """
    if not (folder / "answers.jsonl").is_file():
        return
    steps = sorted(
        {line["step"]: line["answers"] for line in _lines(folder / "answers.jsonl")}.items()
    )
    for number, question in enumerate(json.loads((folder / "questions.json").read_text("utf-8"))):
        answers = [(step, texts[number]) for step, texts in steps if number < len(texts)]
        rows = [
            (f"{step:,}", answer)
            for i, (step, answer) in enumerate(answers)
            if not i or answer != answers[i - 1][1]
        ]
        yield question, [*rows, ("reference", question["truth"])]
