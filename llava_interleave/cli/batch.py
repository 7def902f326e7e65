"""`llava batch`: the samples of a file or a folder, answered into a file."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import LlavaError, OptionError
from ..options import Options
from . import show


def register(app: typer.Typer) -> None:
    app.command("batch")(show.with_options(batch))


def batch(
    source: Annotated[
        Path,
        typer.Argument(help="Samples: .jsonl (also OpenAI's batch format), .csv, .parquet, WebDataset's .tar, or a folder."),
    ],
    out: Annotated[
        Path, typer.Argument(help="The answers, .jsonl: a line a sample, in their order; it appears when all are there.")
    ],
    question: Annotated[str | None, typer.Option(help="Asked of samples that have no question of their own.")] = None,
    together: Annotated[int, typer.Option("--batch", min=1, help="Samples that are computed together.")] = 32,
    model: show.ModelName = None,
    revision: show.Revision = None,
    precision: show.Precision = "auto",
    device: show.Device = "auto",
    *,
    options: Options,
) -> None:
    """Answer many samples. Called again after it was stopped, it goes on; a sample that fails has its error in its line."""
    if out.suffix != ".jsonl":
        raise OptionError(f"the answers are JSON lines: name {out} .jsonl")
    if options.n != 1 or options.logprobs is not None:
        raise OptionError("batch writes one answer to each sample, without log-probabilities")
    from ..offline import Reply, Source, run
    from .answering import Model, answers

    samples = Source(source, question)
    named = Model(model, revision, precision, device, options.adapter)
    bot = named.ready(options)

    def answer(asked: Sequence[Sequence[Mapping[str, Any]]], chosen: Options) -> list[Reply | LlavaError]:
        return [
            said
            if isinstance(said, LlavaError)
            else Reply(said.text, said.finish_reason, said.usage.prompt, said.usage.generated)
            for said in answers(bot, asked, chosen)
        ]

    started = time.monotonic()
    with show.counting("answering") as progress:
        about = {**named.about, "options": {name: _plain(value) for name, value in dataclasses.asdict(options).items()}}
        count, failed = run(samples, out, answer, options, about, batch=together, say=progress)
    seconds = time.monotonic() - started
    print(f"{out}: {count} samples, {failed} with an error, in {seconds:.0f} s", file=sys.stderr)


def _plain(value: Any) -> Any:
    """As JSON gives it back, so that a resumed run compares equal."""
    return list(value) if isinstance(value, tuple) else value
