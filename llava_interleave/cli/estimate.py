"""`llava estimate`: the token count and memory of a question."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from ..options import Options
from . import flags, terminal


def register(app: typer.Typer) -> None:
    app.command("estimate")(flags.with_options(estimate))


def estimate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[QUESTION] [FILE...]", help="The question and files, as of `llava ask`."
        ),
    ] = None,
    attach: flags.Attach = None,
    view: flags.View = None,
    frames_of: flags.FramesOf = None,
    model: flags.ModelName = None,
    revision: flags.Revision = None,
    precision: flags.Precision = "auto",
    device: flags.Device = "auto",
    kv_precision: flags.KvPrecision = "auto",
    limit: flags.Limit = None,
    as_json: flags.Json = False,
    *,
    given: dict[str, Any],
) -> None:
    """Count the tokens of a question and its media and their memory, without loading weights."""
    with terminal.spinner("counting"):
        from ..chat import estimate

        question, files = flags.question_and_files(words) if words else ("", [])
        sources = flags.attachments([*(attach or []), *files], view, frames_of)
        counted = estimate(
            question,
            sources,
            model,
            Options(**given),
            revision=revision,
            precision=precision,
            device=device,
            kv_precision=kv_precision,
            limits=flags.limits(limit or ()),
        )
    if as_json:
        terminal.print_json(dataclasses.asdict(counted))
    else:
        print(counted)
