"""`llava convert` and `llava verify`: checkpoints into other layouts, and against transformers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import show

Layout = Literal["hub", "original", "transformers-4.52", "transformers-5"]


def register(app: typer.Typer) -> None:
    app.command("convert")(convert)
    app.command("verify")(verify)


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint folder or a Hugging Face name.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write; it must not exist or be empty.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; without it as it is.")] = None,
    layout: Annotated[Layout, typer.Option(help="Whose names the tensors have.")] = "hub",
    revision: show.Revision = None,
) -> None:
    """Write a checkpoint in another layout or number type, with its tokenizer and processor files."""
    with show.busy(f"converting {source}"):
        from ..chatbot import named_dtype
        from ..weights import load, resolve, save

        folder = resolve(source, revision)
        wanted = named_dtype(dtype) if dtype else None
        save(load(folder, dtype=wanted), target, processor_from=folder, dtype=wanted, layout=layout)
    print(target)


def verify(
    model: Annotated[str | None, typer.Argument(help="A folder or a Hugging Face name; without it the built-in model.")] = None,
    revision: show.Revision = None,
    tokens: Annotated[int, typer.Option(help="How many greedy tokens are compared.")] = 32,
    as_json: show.Json = False,
) -> None:
    """Compare ids, pixels, logits and greedy tokens with transformers here, in float32. Exit code 1 if they differ."""
    with show.busy("comparing with transformers"):
        from ..verify import verify as compare

        cases = compare(model, revision=revision, tokens=tokens)
    if as_json:
        print(json.dumps([dataclasses.asdict(case) | {"passed": case.passed} for case in cases]))
    else:
        rows = [
            [
                case.name,
                str(case.prompt),
                yes(case.ids),
                f"{case.pixels:.1e}",
                f"{case.logits:.1e}",
                f"{case.same}/{case.tokens}",
                yes(case.passed),
            ]
            for case in cases
        ]
        columns = ["case", "prompt tokens", "same ids", "max pixel diff", "max logit diff", "same tokens", "passed"]
        show.table("ours against transformers, float32", columns, rows)
    if not all(case.passed for case in cases):
        raise typer.Exit(1)


def yes(true: bool) -> str:
    return "yes" if true else "NO"
