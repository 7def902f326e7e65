"""`llava ask`: one question, one answer."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from ..options import Options
from . import terminal

if TYPE_CHECKING:
    from ..chat import Answer, Chatbot


def register(app: typer.Typer) -> None:
    app.command("ask")(terminal.with_options(ask))


def ask(
    question: Annotated[
        str,
        typer.Argument(
            help="What to ask, or '-' for standard input; <image> places an attachment."
        ),
    ],
    attach: terminal.Attach = None,
    view: terminal.View = None,
    model: terminal.ModelName = None,
    revision: terminal.Revision = None,
    precision: terminal.Precision = "auto",
    device: terminal.Device = "auto",
    as_json: terminal.Json = False,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print the answer while it is written.")
    ] = True,
    explain: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Write a page that shows which images the answer leaned on, and where in them.",
        ),
    ] = None,
    *,
    options: Options,
) -> None:
    """Ask about pictures, videos, folders of frames and views."""
    if question == "-" and "-" in (attach or []):
        raise OptionError("standard input can be the question or an attachment, not both")
    if options.logprobs is not None and not as_json:
        raise OptionError("--logprobs are reported with --json")
    if question == "-":
        question = sys.stdin.read().strip()
    sources = terminal.attachments(attach, view)
    if explain is not None and (options.n > 1 or not sources):
        raise OptionError(
            "--explain tells of one answer about images: "
            + ("leave out -n" if options.n > 1 else "attach one")
        )
    bot = terminal.load(model, revision, precision, device, options.adapter)
    messages = bot.turn(question, sources)
    if stream and options.n == 1 and not as_json:
        answers = [write(bot, messages, options)]
    else:
        with terminal.busy("answering"):
            answers = bot.choices(messages, options)
        if as_json:
            print(json.dumps(report(bot, options, answers), ensure_ascii=False))
        else:
            print(*answers, sep="\n")
    if explain is not None:
        with terminal.busy("explaining"):
            bot.explain(messages, answers[0], options).save(explain)


def write(bot: Chatbot, messages: list[dict[str, Any]], options: Options) -> Answer:
    """Print the answer to stdout piece by piece; until the first one comes, how much of the prompt is read."""
    with terminal.busy("looking and reading") as progress:
        pieces = bot.stream(messages, options, progress=progress)
        chunk = next(chunk for chunk in pieces if chunk.text or chunk.answer)
    print(chunk.text, end="", flush=True)
    for chunk in pieces:
        print(chunk.text, end="", flush=True)
    print()
    assert chunk.answer is not None
    return chunk.answer


def report(bot: Chatbot, options: Options, answers: list[Answer]) -> dict[str, Any]:
    """What --json prints: the fields of the answer, or a list of them under `answers` where several were asked for."""
    source: dict[str, Any] = {
        "model": bot.source.name,
        "adapter": options.adapter,
        "preset": options.preset,
    }
    if options.n > 1:
        return source | {"answers": [dataclasses.asdict(answer) for answer in answers]}
    return source | dataclasses.asdict(answers[0])
