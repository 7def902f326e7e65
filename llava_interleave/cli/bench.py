"""`llava bench`: the speed of a model on this machine."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from . import flags, terminal
from .local_model import ModelFlags


def register(app: typer.Typer) -> None:
    app.command("bench")(bench)


def bench(
    model: flags.ModelName = None,
    revision: flags.Revision = None,
    precision: flags.Precision = "auto",
    device: flags.Device = "auto",
    images: Annotated[int, typer.Option(min=1, help="Images per question.")] = 2,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; medians are reported.")] = 3,
    as_json: flags.Json = False,
) -> None:
    """Benchmark image encoding, prefill and decode.

    Each is also a fraction of this machine's measured peak compute or bandwidth.
    """
    bot = ModelFlags(model, revision, precision, device).load()
    with terminal.spinner("measuring") as progress:
        from ..bench import measure

        report = measure(bot, images=images, tokens=tokens, rounds=rounds, progress=progress)
    if as_json:
        terminal.print_json(dataclasses.asdict(report))
        return
    for name, value in report.about.items():
        print(f"{name}: {', '.join(value) if isinstance(value, list) else value}")
    rows = [
        [
            f"{f.name}, {f.unit}",
            number(f.median),
            f"{number(f.minimum)} to {number(f.maximum)}",
            "" if f.share is None else f"{f.share:.0%}",
        ]
        for f in report.figures
    ]
    terminal.table("", ["", "median", "min to max", "of the peak"], rows)


def number(value: float) -> str:
    """Three significant digits, or all digits of the integer part."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
