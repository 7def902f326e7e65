"""`llava train` and `llava data check`: supervised fine-tuning, and what it would be trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError
from . import show

SOURCE = "Samples: .json or .jsonl, a .yaml mixture of those, or a folder of pictures; docs/training.md has the forms."
Media = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="Folder where relative paths of media begin; without it beside the file."),
]


def register(app: typer.Typer) -> None:
    app.command("train")(train)
    data = typer.Typer(help="Look at training data.", no_args_is_help=True, rich_markup_mode=None)
    data.callback()(lambda: None)  # so that its one command keeps its name
    data.command("check")(check)
    app.add_typer(data, name="data")


def train(
    source: Annotated[Path, typer.Argument(help=SOURCE)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of log, checkpoints and the finished `model`.")],
    steps: Annotated[int, typer.Option(min=1, help="How many times the weights change.")],
    model: show.ModelName = None,
    media: Media = None,
    question: Annotated[str | None, typer.Option(help="What is asked about the pictures of a folder.")] = None,
    held_out: Annotated[
        float | None, typer.Option(min=0, max=0.9, help="Share of a folder that is not trained on; without it 0.1.")
    ] = None,
    skip_errors: Annotated[
        bool, typer.Option("--skip-errors", help="Leave out samples with errors and list them, instead of refusing to start.")
    ] = False,
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate of a cosine with warm-up.")] = 1e-5,
    warmup: Annotated[int, typer.Option(min=1, help="Steps over which the learning rate rises.")] = 100,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a batch; samples are packed, never cut.")] = 8192,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches a step.")] = 1,
    tower: Annotated[float, typer.Option(min=0, help="Factor on the learning rate of the vision tower; 0 freezes it.")] = 0.0,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Multiply matrices in bfloat16; weights stay float32.")] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
    seed: Annotated[int, typer.Option(help="Order of the samples, and what is drawn or held out.")] = 0,
) -> None:
    """Fine-tune a model on conversations about images and videos, all read first. Called again, it goes on where it stopped."""
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
    done = finetune(
        locate(model, None),
        source,
        out,
        config,
        media=media,
        question=question,
        held_out=held_out,
        skip_errors=skip_errors,
        tokens=tokens,
        seed=seed,
    )
    print(done)


def check(
    source: Annotated[Path, typer.Argument(help=SOURCE)],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Count tokens, too, as this checkpoint does: a folder or a Hugging Face name."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="With -m, the most tokens of a sample; without it 8192.")] = None,
    media: Media = None,
    seed: Annotated[int | None, typer.Option(help="Of what a mixture draws at random, as for `llava train`; 0.")] = None,
    as_json: show.Json = False,
) -> None:
    """Read every sample and its media, and list what is wrong. Exit code 1 if there are errors; remarks alone are none."""
    if tokens is not None and model is None:
        raise OptionError("--tokens needs a checkpoint to count with: name one with -m")
    if seed is not None and source.suffix not in (".yaml", ".yml"):
        raise OptionError(f"{source} is no mixture that draws at random: leave out --seed")
    with show.busy("starting"):
        from ..chatbot import locate
        from ..processing import Processor
        from ..train import check as checking
        from ..train.sources import rows

    processor = Processor.from_folder(locate(model, None, tensors=False)) if model else None
    with show.counting("reading") as progress:
        checked = checking.check(rows(source, media=media, seed=seed or 0), processor, tokens or 8192, progress)
    counts = checking.table(checked)
    errors = sum(one.error for one in checked)
    if as_json:
        faults = [
            {"sample": one.row.name, "data_set": one.row.group, "kind": fault.kind, "error": fault.error, "text": fault.text}
            for one in checked
            for fault in one.faults
        ]
        print(json.dumps({"samples": len(checked), "errors": errors, "data_sets": counts, "faults": faults}, ensure_ascii=False))
    else:
        for one in checked:
            for fault in one.faults:
                print(f"{'error' if fault.error else 'remark'}: {fault.text}")
        columns = ["samples", "errors", *(kind for kind in checking.KINDS if any(row[kind] for row in counts.values()))]
        table = [[name, *(str(row[column]) for column in columns)] for name, row in counts.items()]
        show.table(f"{source}", ["data set", *columns], table)
        if processor is None:
            print("Lengths were not checked: -m names the checkpoint to count with.")
    if errors:
        raise typer.Exit(1)
