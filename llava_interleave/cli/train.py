"""`llava train`: supervised fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import show


def register(app: typer.Typer) -> None:
    app.command("train")(train)


def train(
    annotations: Annotated[
        Path, typer.Argument(help="Samples in the M4-Instruct / LLaVA form, .json or .jsonl; media beside it.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of log, checkpoints and the finished `model`.")],
    steps: Annotated[int, typer.Option(min=1, help="How many times the weights change.")],
    model: show.ModelName = None,
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate of a cosine with warm-up.")] = 1e-5,
    warmup: Annotated[int, typer.Option(min=1, help="Steps over which the learning rate rises.")] = 100,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a batch; samples are packed, never cut.")] = 8192,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches a step.")] = 1,
    tower: Annotated[float, typer.Option(min=0, help="Factor on the learning rate of the vision tower; 0 freezes it.")] = 0.0,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Multiply matrices in bfloat16; weights stay float32.")] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
    seed: Annotated[int, typer.Option(help="Order of the samples.")] = 0,
) -> None:
    """Fine-tune a model on conversations about images and videos. Called again, it goes on where it stopped."""
    with show.busy("starting"):
        from ..chatbot import locate
        from ..train.finetune import finetune
        from ..train.loop import TrainConfig

    config = TrainConfig(
        steps=steps,
        lr=lr,
        warmup=warmup,
        scales=(("vision_tower.", tower),),
        decay=0.0,
        accumulate=accumulate,
        bfloat16=bfloat16,
        save_every=save_every,
    )
    print(finetune(locate(model, None), annotations, out, config, tokens=tokens, seed=seed))
