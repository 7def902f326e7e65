"""The command `llava`: thin commands over the library, one file a group. Importing it imports no torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..errors import LlavaError
from . import ask, batch, bench, chat, checkpoint, demo, estimate, evaluate, quantize, serve, train

app = typer.Typer(
    name="llava",
    help="Many images, videos and views in, text out.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"llava {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Many images, videos and views in, text out."""


for module in (
    ask,
    chat,
    serve,
    batch,
    estimate,
    demo,
    evaluate,
    train,
    checkpoint,
    quantize,
    bench,
):
    module.register(app)


def reference() -> str:
    """The Markdown of docs/cli.md: the help of every command, as the program prints it."""
    from typer.testing import CliRunner

    def told(*words: str) -> str:
        result = CliRunner().invoke(app, [*words, "--help"], prog_name="llava", terminal_width=120)
        assert result.exit_code == 0, result.output
        return f"```console\n$ llava {' '.join([*words, '--help'])}\n{result.output.strip()}\n```\n"

    names: list[tuple[str, ...]] = []
    for name, command in typer.main.get_group(app).commands.items():
        below = getattr(command, "commands", None)  # those of a group
        names += [(name, own) for own in below] if below else [] if command.hidden else [(name,)]
    sections = [f"## llava {' '.join(words)}\n\n{told(*words)}" for words in names]
    return "\n".join(
        [
            "# The command line\n\nWritten by `llava reference`; a test compares.\n",
            told(),
            *sections,
        ]
    )


@app.command("reference", hidden=True)
def print_reference() -> None:
    """Print docs/cli.md."""
    print(reference(), end="")


def main() -> None:
    """Run the command line: an error is one line on stderr and its exit code, Ctrl-C exits 130, a closed pipe is quiet."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["RANK"] != "0":
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115  what comes in is for one process
    try:
        app()
    except LlavaError as error:
        print(f"llava: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
