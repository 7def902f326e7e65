"""Output on a terminal: spinners and progress bars on stderr, tables on stdout."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import sys
from collections.abc import Callable, Iterator

Progress = Callable[[int, int], None]
"""Shows (done, total)."""


@contextlib.contextmanager
def spinner(title: str) -> Iterator[Progress]:
    """A spinner with the elapsed time; the yielded function adds a percentage.

    Silent where stderr is not a terminal.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(title)
        yield lambda done, total: progress.update(
            task, description=f"{title} {done / max(total, 1):.0%}"
        )


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """The spinner while PyTorch is imported, without garbage collection: an import makes hundreds
    of thousands of objects that stay. This saves a tenth of the time to a first answer.
    """
    with spinner("starting"):
        if "torch" in sys.modules:
            yield
            return
        gc.disable()
        try:
            yield
        finally:
            gc.enable()
            gc.freeze()


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A bar with items per second and the time left; the speed counts from the first call on.

    Silent where stderr is not a terminal.
    """
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
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=600,
    ) as progress:
        task = progress.add_task(title, total=None, speed="")

        def update(done: int, total: int) -> None:
            if progress.tasks[task].total is None:
                progress.reset(task, total=total, completed=done)
            speed = progress.tasks[task].speed
            progress.update(task, completed=done, speed=f"{speed:.2g}/s," if speed else "")

        yield update


def wrote(path: object) -> None:
    """Say on stderr that a file was written."""
    print(f"wrote {path}", file=sys.stderr)


@contextlib.contextmanager
def resumable(out: object) -> Iterator[None]:
    """On Ctrl-C, say that the same command goes on where this one stopped."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nstopped; run the same command again to continue {out}", file=sys.stderr)
        raise


def print_json(value: object) -> None:
    """One JSON object on stdout; escaped where the encoding lacks characters."""
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    print(json.dumps(value, ensure_ascii=not unicode))


def tolerate_encodings() -> None:
    """Escape characters that stdout or stderr cannot encode, and replace invalid bytes of stdin.

    A console in cp1252 or a pipe in ASCII then never ends an answer in the middle.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as one line on stderr, without the line of code that it is from."""
    print(f"llava: {str(message).removeprefix('llava: ')}", file=sys.stderr)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; the first column is text, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    output = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        output.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        output.add_row(*row)
    Console().print(output)
