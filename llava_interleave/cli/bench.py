"""`llava bench`: how fast a model is on this machine."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from . import terminal


def register(app: typer.Typer) -> None:
    app.command("bench")(bench)


def bench(
    model: terminal.ModelName = None,
    revision: terminal.Revision = None,
    precision: terminal.Precision = "auto",
    device: terminal.Device = "auto",
    images: Annotated[int, typer.Option(min=1, help="Pictures in each question.")] = 2,
    tokens: Annotated[int, typer.Option(min=2, help="Length of an answer.")] = 64,
    rounds: Annotated[
        int, typer.Option(min=1, help="How often all is measured; the medians are told.")
    ] = 3,
    as_json: terminal.Json = False,
) -> None:
    """Measure how fast a model reads pictures and prompts and writes here, as shares of what this machine gives."""
    bot = terminal.load(model, revision, precision, device)
    with terminal.busy("measuring") as progress:
        from ..bench import measure

        report = measure(bot, images=images, tokens=tokens, rounds=rounds, progress=progress)
    if as_json:
        print(json.dumps(dataclasses.asdict(report), ensure_ascii=False))
        return
    for name, value in report.about.items():
        print(f"{name}: {', '.join(value) if isinstance(value, list) else value}")
    rows = [
        [
            f"{f.name}, {f.unit}",
            number(f.median),
            f"{number(f.least)} to {number(f.most)}",
            "" if f.share is None else f"{f.share:.0%}",
        ]
        for f in report.figures
    ]
    terminal.table("", ["", "median", "least to most", "of the ceiling"], rows)


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
