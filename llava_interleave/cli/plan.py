"""`llava plan`: what a question costs, before anything is computed."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from ..options import Options
from . import show


def register(app: typer.Typer) -> None:
    app.command("plan")(show.with_options(plan))


def plan(
    question: Annotated[str, typer.Argument(help="The question; <image> in it places an attachment.")] = "",
    attach: show.Attach = None,
    view: show.View = None,
    model: show.ModelName = None,
    revision: show.Revision = None,
    precision: show.Precision = "auto",
    device: show.Device = "auto",
    as_json: show.Json = False,
    *,
    options: Options,
) -> None:
    """Count the tokens of a question and its media, and the memory they need, without loading weights."""
    with show.busy("counting"):
        from ..chatbot import estimate

        sources = show.attachments(attach, view)
        counted = estimate(question, sources, model, options, revision=revision, precision=precision, device=device)
    print(json.dumps(dataclasses.asdict(counted), ensure_ascii=False) if as_json else counted)
