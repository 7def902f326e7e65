"""`llava estimate`: the token count and memory of a question."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from ..options import Options
from . import flags, terminal


def register(app: typer.Typer) -> None:
    app.command("estimate")(flags.with_options(estimate))


def estimate(
    question: Annotated[
        str, typer.Argument(help="The question; <image> places an attachment.")
    ] = "",
    attach: flags.Attach = None,
    view: flags.View = None,
    frames_of: flags.FramesOf = None,
    model: flags.ModelName = None,
    revision: flags.Revision = None,
    precision: flags.Precision = "auto",
    device: flags.Device = "auto",
    as_json: flags.Json = False,
    *,
    options: Options,
) -> None:
    """Count the tokens of a question and its media and their memory, without loading weights."""
    with terminal.spinner("counting"):
        from ..chat import estimate

        sources = flags.attachments(attach, view, frames_of)
        counted = estimate(
            question, sources, model, options, revision=revision, precision=precision, device=device
        )
    print(json.dumps(dataclasses.asdict(counted), ensure_ascii=False) if as_json else counted)
