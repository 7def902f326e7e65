"""What the commands share: flags made from `Options`, attachments from words, a spinner and tables."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from ..options import Options

if TYPE_CHECKING:
    from ..chat import Chatbot

Attach = Annotated[
    list[str] | None,
    typer.Option(
        "--attach",
        "-a",
        metavar="FILE|URL|-",
        help="A picture, a video, a folder of frames, or '-' for standard input.",
    ),
]
View = Annotated[
    list[str] | None,
    typer.Option(
        "--view",
        metavar="NAME=FILE",
        help="One view of a scene and its name; all --view together are one set.",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A checkpoint folder or a Hugging Face name; without it the built-in model.",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face name.")]
APART = "parts apart: int4,head=int4 or int8,tower=float."
_PRECISIONS = f"auto, float32, bfloat16, float16, int8, int4, on a CUDA GPU fp8 or nf4; int8 and int4 also with {APART}"
Precision = Annotated[str, typer.Option(help=_PRECISIONS)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic", help="The same bytes whatever else is answered meanwhile; slower."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def with_flags(
    record: type[Any], name: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes `name: record`, a dataclass whose fields have a help, a flag for every field of it."""
    hints = typing.get_type_hints(record)
    fields = [
        field for field in dataclasses.fields(record) if field.name != "logit_bias"
    ]  # a mapping is no flag
    flags = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if field.default == () else field.default,
            annotation=Annotated[
                _flag_type(hints[field.name]),
                typer.Option(_flag_name(field.name), help=field.metadata["help"]),
            ],
        )
        for field in fields
    ]

    def give(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            p
            for p in inspect.signature(command, eval_str=True).parameters.values()
            if p.name != name
        ]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            chosen = {field.name: given.pop(field.name) for field in fields}
            lists = {
                field.name: tuple(chosen[field.name] or ())
                for field in fields
                if field.default == ()
            }
            command(**given, **{name: record(**(chosen | lists))})

        run.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*own, *flags]}
        return run

    return give


def _flag_name(field: str) -> str:
    return {"n": "-n", "stop_ids": "--stop-id"}.get(field, "--" + field.replace("_", "-"))


def _flag_type(hint: Any) -> Any:
    """The type that a flag has for a field: several texts or ids become a list that is given one at a time."""
    if "tuple" not in str(hint):
        return hint
    return list[int] | None if hint == tuple[int, ...] else list[str] | None


with_options = with_flags(Options, "options")
"""Gives a command that takes `options: Options` a flag for every field of it."""


def attachments(words: list[str] | None, views: list[str] | None) -> list[object]:
    """What -a and --view name; '-' is read from standard input. Raises `OptionError` for a view without a name."""
    sources: list[object] = [
        sys.stdin.buffer.read() if word == "-" else word for word in words or []
    ]
    if views:
        pairs = [view.partition("=") for view in views]
        if not all(name and equals and file for name, equals, file in pairs):
            raise OptionError("--view takes NAME=FILE, for example --view front=front.png")
        sources.append(
            {"type": "views", "views": [{"name": name, "image": file} for name, _, file in pairs]}
        )
    return sources


@contextlib.contextmanager
def busy(what: str) -> Iterator[Callable[[int, int], None]]:
    """A spinner with the time gone by on stderr while something runs; silent where stderr is no terminal.

    Yields a function that shows how far it is: (done, total).
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(what)
        yield lambda done, total: progress.update(
            task, description=f"{what} {done / max(total, 1):.0%}"
        )


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """As `busy`, with a bar, how many a second and the time left; what is done at the first call is not taken for speed."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=600,
    ) as progress:
        task = progress.add_task(what, total=None, pace="")

        def tell(done: int, total: int) -> None:
            if progress.tasks[task].total is None:
                progress.reset(task, total=total, completed=done)
            speed = progress.tasks[task].speed
            progress.update(task, completed=done, pace=f"{speed:.2g}/s," if speed else "")

        yield tell


def load(
    model: str | None,
    revision: str | None,
    precision: str,
    device: str,
    adapter: str | None = None,
    deterministic: bool = False,
) -> Chatbot:
    """The chatbot that the flags name. A download draws its own bars; reading the weights shows how far it is.

    adapter: what the flag says, which is its folder or Hugging Face name, and the name that the option has for it, too.
    """
    with busy("starting"):
        from ..chat import load as read
        from ..chat import locate
    locate(model, revision)
    with busy(f"loading {model or 'the built-in model'}") as progress:
        adapters = {adapter: adapter} if adapter else {}
        return read(
            model,
            revision=revision,
            precision=precision,
            device=device,
            deterministic=deterministic,
            adapters=adapters,
            progress=progress,
        )


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; the first column is text, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    Console().print(drawn)
