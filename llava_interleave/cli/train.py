"""`llava train`, `llava train report` and `llava data check`: a run by a recipe, a page about it, what it would be trained on."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import OptionError
from ..train import recipe
from . import terminal

SOURCE = "Samples: .json or .jsonl, a .yaml mixture of those, or a folder of pictures; docs/training.md has the forms."
Media = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        file_okay=False,
        help="Folder where relative paths of media begin; without it beside the file.",
    ),
]
SPECIAL = ("model", "source", "media", *recipe.TABLES)
"""Settings that are no plain flags."""


class TwoWords(TyperGroup):
    """Knows commands of two words: `train report` beside `train`. Training on a folder called report is `train ./report`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        two = " ".join(args[:2])
        return super().resolve_command(ctx, [two, *args[2:]] if two in self.commands else args)


def register(app: typer.Typer) -> None:
    app.info.cls = TwoWords
    app.command("train")(with_settings(train))
    app.command("train report")(report)
    data = typer.Typer(help="Look at training data.", no_args_is_help=True, rich_markup_mode=None)
    data.callback()(lambda: None)  # so that its one command keeps its name
    data.command("check")(check)
    app.add_typer(data, name="data")


def with_settings(command: Any) -> Any:
    """Give a command that takes `given` a flag for every setting of a recipe; `given` has those that were used."""
    made = {parameter.name: (key, parameter) for key, parameter in _flags()}
    own = [
        p
        for p in inspect.signature(command, eval_str=True).parameters.values()
        if p.name != "given"
    ]

    def run(**words: Any) -> None:
        used = {key: words.pop(name) for name, (key, _) in made.items()}
        lists = {
            key: tuple(value) for key, value in used.items() if isinstance(value, list) and value
        }
        single = {
            key: value
            for key, value in used.items()
            if value is not None and not isinstance(value, list)
        }
        command(**words, given=single | lists)

    parameters = [*own, *(parameter for _, parameter in made.values())]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = command.__doc__
    return run


def _flags() -> Iterator[tuple[str, inspect.Parameter]]:
    """For each setting its name in a recipe, and its flag, which is nothing where it is not used."""
    tables: list[tuple[str, type[Any]]] = [
        ("", recipe.Recipe),
        *((f"{name}.", table) for name, table in recipe.TABLES.items()),
    ]
    for table, record in tables:
        for field, hint in recipe.fields(record):
            if not table and field.name in SPECIAL:
                continue
            name = f"{table}{field.name}".replace(".", "-").replace("_", "-")
            kind = list[str] if "tuple" in str(hint) else hint
            default = field.default
            told = (
                " ".join(default)
                if isinstance(default, tuple)
                else f"{default:g}"
                if isinstance(default, float)
                else default
            )
            sentence = field.metadata["help"] + (
                f"  [default: {told}]" if told is not None and hint is not bool else ""
            )
            option = typer.Option(
                f"--{name}/--no-{name}" if hint is bool else f"--{name}", help=sentence
            )
            flag = Annotated[kind | None, option]  # type: ignore[valid-type]
            where = inspect.Parameter.KEYWORD_ONLY
            yield (
                f"{table}{field.name}",
                inspect.Parameter(name.replace("-", "_"), where, default=None, annotation=flag),
            )


def train(
    given: dict[str, Any],
    source: Annotated[
        Path | None, typer.Argument(help=SOURCE + " Without it the recipe's.")
    ] = None,
    *,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder of log, checkpoints and the finished `model`."),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME|FILE",
            help=f"A .toml file, or {', '.join(recipe.SHIPPED)}; flags change it.",
        ),
    ] = None,
    model: terminal.ModelName = None,
    media: Media = None,
) -> None:
    """Train a model on conversations about images and videos, all read first. Called again, it goes on where it stopped."""
    chosen = recipe.read(recipe.find(name)) if name else recipe.Recipe()
    if source:
        given["source"] = source.absolute()
    if media:
        given["media"] = media.absolute()
    chosen = chosen.but(given)
    if chosen.source is None:
        raise OptionError(
            "there is nothing to train on: name samples, or a recipe that has a source"
        )
    with terminal.busy("starting"):
        from ..chat import locate
        from ..distributed.process_group import rank_and_world_size
        from ..train.run import run

    folder = locate(model or chosen.model, None)
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
        typer.Option("--out", "-o", help="The page; without it report.html in the folder."),
    ] = None,
) -> None:
    """Write a page about a run, one HTML file: curves, settings, and what it answered over time."""
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
            help="Count tokens, too, as this checkpoint does: a folder or a Hugging Face name.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="With -m, the most tokens of a sample; without it 8192."),
    ] = None,
    media: Media = None,
    seed: Annotated[
        int | None, typer.Option(help="Of what a mixture draws at random, as for `llava train`; 0.")
    ] = None,
    as_json: terminal.Json = False,
) -> None:
    """Read every sample and its media, and list what is wrong. Exit code 1 if there are errors; remarks alone are none."""
    if tokens is not None and model is None:
        raise OptionError("--tokens needs a checkpoint to count with: name one with -m")
    if seed is not None and source.suffix not in (".yaml", ".yml"):
        raise OptionError(f"{source} is no mixture that draws at random: leave out --seed")
    with terminal.busy("starting"):
        from ..chat import locate
        from ..processing import Processor
        from ..train import validate as checking
        from ..train.datasets import rows

    processor = Processor.from_folder(locate(model, None, tensors=False)) if model else None
    with terminal.counting("reading") as progress:
        checked = checking.check(
            rows(source, media=media, seed=seed or 0), processor, tokens or 8192, progress
        )
    counts = checking.table(checked)
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
        print(
            json.dumps(
                {"samples": len(checked), "errors": errors, "data_sets": counts, "faults": faults},
                ensure_ascii=False,
            )
        )
    else:
        for one in checked:
            for fault in one.faults:
                print(f"{'error' if fault.error else 'remark'}: {fault.text}")
        columns = [
            "samples",
            "errors",
            *(kind for kind in checking.KINDS if any(row[kind] for row in counts.values())),
        ]
        table = [[name, *(str(row[column]) for column in columns)] for name, row in counts.items()]
        terminal.table(f"{source}", ["data set", *columns], table)
        if processor is None:
            print("Lengths were not checked: -m names the checkpoint to count with.")
    if errors:
        raise typer.Exit(1)
