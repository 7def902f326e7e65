"""`llava train`, `llava train report` and `llava data check`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from ..errors import OptionError
from ..train import recipe
from . import flags, terminal

SOURCE = (
    "Samples: .json, .jsonl, .parquet or .tar (with * several), a .yaml mixture of those, or a "
    "folder of images; see docs/training.md."
)
Media = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        file_okay=False,
        help="Base folder of relative media paths.  [default: the samples' folder]",
    ),
]
SPECIAL = ("model", "source", "media", *recipe.TABLES)
"""Recipe fields with their own argument or table."""


def register(app: typer.Typer) -> None:
    app.command("train")(train)
    app.command("train report")(report)
    data = typer.Typer(help="Inspect training data.", no_args_is_help=True, rich_markup_mode=None)
    data.callback()(lambda: None)  # so that its one command keeps its name
    data.command("check")(check)
    app.add_typer(data, name="data")


@flags.with_flags("overrides", recipe.Recipe, tables=recipe.TABLES, without=SPECIAL, overrides=True)
def train(
    source: Annotated[
        Path | None, typer.Argument(help=SOURCE + "  [default: the recipe's]")
    ] = None,
    *,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder of the log, the checkpoints and the final `model`."
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME|FILE",
            help=f"A .toml file, or {', '.join(recipe.SHIPPED)}; flags override it.",
        ),
    ] = None,
    model: flags.ModelName = None,
    media: Media = None,
    overrides: dict[str, Any],
) -> None:
    """Train a model on conversations about images and videos.

    All samples are validated first. An interrupted run resumes.
    """
    chosen = recipe.read(recipe.find(name)) if name else recipe.Recipe()
    if source:
        overrides["source"] = source.absolute()
    if media:
        overrides["media"] = media.absolute()
    chosen = chosen.but(overrides)
    if chosen.source is None:
        raise OptionError("no training data: name samples, or a recipe that has a source")
    with terminal.starting():
        from ..chat import locate
        from ..distributed.process_group import rank_and_world_size
        from ..train.loop import flushing_denormals
        from ..train.run import run

    folder = locate(model or chosen.model, None)
    with terminal.resumable(out), flushing_denormals():
        done = run(chosen.but({"model": str(folder.absolute())}), out)
    if rank_and_world_size()[0] == 0:
        print(done)


def report(
    folder: Annotated[
        Path,
        typer.Argument(exists=True, file_okay=False, help="The folder of a run, finished or not."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The HTML file.  [default: report.html in the folder]"),
    ] = None,
) -> None:
    """Write an HTML report of a run: curves, settings and sample generations over time."""
    from ..train import report as reporting

    page = out or folder / "report.html"
    reporting.write(folder, page)
    print(page)


def check(
    source: Annotated[Path, typer.Argument(help=SOURCE)],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Also count tokens with this checkpoint: a folder or a Hugging Face name.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="With -m, the maximum tokens of a sample.  [default: 8192]"),
    ] = None,
    media: Media = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of a mixture's random choices.  [default: 0]")
    ] = None,
    as_json: flags.Json = False,
) -> None:
    """Validate every sample and its media. Exit code 1 for errors, not for warnings alone."""
    if tokens is not None and model is None:
        raise OptionError("--tokens needs a checkpoint to count with: name one with -m")
    if seed is not None and source.suffix not in (".yaml", ".yml"):
        raise OptionError(f"--seed is for .yaml mixtures, and {source} is not one: leave it out")
    with terminal.starting():
        from ..chat import locate
        from ..processing import Processor
        from ..train.data.datasets import samples, unlabelled
        from ..train.data.index import RowFile
        from ..train.data.validate import KINDS, tally, validate

    processor = Processor.from_folder(locate(model, None, tensors=False)) if model else None
    counts: dict[str, dict[str, int]] = {}
    with TemporaryDirectory() as folder, terminal.progress_bar("reading") as progress:
        rows = map(unlabelled, samples(source, media=media, seed=seed or 0))
        found = RowFile.write(Path(folder) / "rows", rows)
        checked = [
            one
            for one in validate(found, processor, tokens or 8192, progress)
            if tally(counts, one) and one.faults
        ]
    errors = sum(one.error for one in checked)
    if as_json:
        faults = [
            {
                "sample": one.row.name,
                "data_set": one.row.group,
                "kind": fault.kind,
                "error": fault.error,
                "text": fault.text,
            }
            for one in checked
            for fault in one.faults
        ]
        terminal.print_json(
            {"samples": len(found), "errors": errors, "data_sets": counts, "faults": faults}
        )
    else:
        for one in checked:
            for fault in one.faults:
                print(f"{'error' if fault.error else 'warning'}: {fault.text}")
        columns = [
            "samples",
            "errors",
            *(kind for kind in KINDS if any(row[kind] for row in counts.values())),
        ]
        cells = [[name, *(str(row[column]) for column in columns)] for name, row in counts.items()]
        terminal.table(f"{source}", ["data set", *columns], cells)
        if processor is None:
            print("Token lengths were not checked: name a checkpoint with -m.")
    if errors:
        raise typer.Exit(1)
