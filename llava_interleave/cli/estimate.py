"""`llava estimate`: what a question costs, before anything is computed."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from ..options import Options
from . import terminal


def register(app: typer.Typer) -> None:
    app.command("estimate")(terminal.with_options(estimate))


def estimate(
    question: Annotated[
        str, typer.Argument(help="The question; <image> in it places an attachment.")
    ] = "",
    attach: terminal.Attach = None,
    view: terminal.View = None,
    model: terminal.ModelName = None,
    revision: terminal.Revision = None,
    precision: terminal.Precision = "auto",
    device: terminal.Device = "auto",
    as_json: terminal.Json = False,
    *,
    options: Options,
) -> None:
    """Count the tokens of a question and its media, and the memory they need, without loading weights."""
    with terminal.busy("counting"):
        from ..chat import estimate

        sources = terminal.attachments(attach, view)
        counted = estimate(
            question, sources, model, options, revision=revision, precision=precision, device=device
        )
    print(json.dumps(dataclasses.asdict(counted), ensure_ascii=False) if as_json else counted)
