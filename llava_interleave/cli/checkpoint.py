"""`llava convert` and `llava verify`: checkpoints into other layouts, and against transformers."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

from .. import __version__
from . import terminal

Layout = Literal["hub", "original", "transformers-4.52", "transformers-5"]


def register(app: typer.Typer) -> None:
    app.command("convert")(convert)
    app.command("verify")(verify)


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint folder or a Hugging Face name.")
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="DST", help="The folder to write; it must not exist or be empty."),
    ],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; without it as it is.")
    ] = None,
    layout: Annotated[Layout, typer.Option(help="Whose names the tensors have.")] = "hub",
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Merge this adapter into the weights: a folder in PEFT's format or a Hugging Face name."
        ),
    ] = None,
    revision: terminal.Revision = None,
) -> None:
    """Write a checkpoint in another layout or number type, with its tokenizer and processor files."""
    with terminal.busy(f"converting {source}"):
        import torch

        from ..chat import named_dtype
        from ..checkpoints import load, read_adapter, resolve, save
        from ..lora import merge

        folder = resolve(source, revision)
        wanted = named_dtype(dtype) if dtype else None
        network = load(folder, dtype=wanted)
        if adapter:
            merge(network, read_adapter(resolve(adapter), network, dtype=torch.float32))
        save(network, target, processor_from=folder, dtype=wanted, layout=layout)
    print(target)


def verify(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder or a Hugging Face name; without it the built-in model."),
    ] = None,
    revision: terminal.Revision = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="With this adapter beside the weights, there by PEFT: a folder or a Hugging Face name."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="What transformers reads instead: of quantized weights the checkpoint they were made from.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many greedy tokens are compared.")] = 32,
    why: Annotated[
        bool,
        typer.Option(
            "--why",
            help="Also switch preset, geometry, precision and layer, each alone, and tell what it does.",
        ),
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write everything to this file, one page.")
    ] = None,
    as_json: terminal.Json = False,
) -> None:
    """Compare ids, pixels, layers, logits and greedy tokens with transformers here, in float32. Exit code 1 if they differ.

    Quantized weights are compared with themselves as floats, inputs rounded alike, or with --against.
    """
    with terminal.busy("comparing with transformers"):
        from .. import verify as parity
        from ..verify import report

        cases = parity.verify(
            model, revision=revision, adapter=adapter, against=against, tokens=tokens
        )
    effects: list[parity.AblationResult] = []
    if why:
        with terminal.busy("switching one thing at a time") as progress:
            effects = parity.why(
                model, revision=revision, adapter=adapter, tokens=tokens, say=progress
            )
    versions = {
        "llava-interleave": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    given = {name: value for name, value in (("adapter", adapter), ("against", against)) if value}
    about = {"model": model or "the built-in model", **given, **versions}
    if html:
        report.write(html, f"llava verify: {about['model']}", cases, effects, about)
    if as_json:
        print(
            json.dumps(
                about
                | {
                    "cases": [case.told() for case in cases],
                    "why": [dataclasses.asdict(effect) for effect in effects],
                }
            )
        )
    else:
        terminal.table(
            f"ours against {cases[0].standard.told}", list(report.CASES), report.case_rows(cases)
        )
        terminal.table(
            "stage by stage: the prompt in which each differs most",
            list(report.STAGES),
            report.stage_rows(cases),
        )
        if effects:
            terminal.table(
                f"one thing switched; baseline: {parity.BASELINE}",
                list(report.EFFECTS),
                report.effect_rows(effects),
            )
    if not all(case.passed for case in cases):
        raise typer.Exit(1)
