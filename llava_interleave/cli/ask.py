"""`llava ask`: one question, one answer."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from ..options import Options
from . import show

if TYPE_CHECKING:
    from ..chatbot import Answer, Chatbot


def register(app: typer.Typer) -> None:
    app.command("ask")(show.with_options(ask))


def ask(
    question: Annotated[str, typer.Argument(help="What to ask, or '-' for standard input; <image> places an attachment.")],
    attach: show.Attach = None,
    view: show.View = None,
    model: show.ModelName = None,
    revision: show.Revision = None,
    precision: show.Precision = "auto",
    device: show.Device = "auto",
    as_json: show.Json = False,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print the answer while it is written.")] = True,
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
    sources = show.attachments(attach, view)
    bot = show.load(model, revision, precision, device)
    if as_json:
        with show.busy("answering"):
            answers = bot.choices(bot.turn(question, sources), options)
        print(json.dumps(report(bot, options, answers), ensure_ascii=False))
    elif stream and options.n == 1:
        write(bot, bot.turn(question, sources), options)
    else:
        with show.busy("answering"):
            answers = bot.choices(bot.turn(question, sources), options)
        for answer in answers:
            print(answer)


def write(bot: Chatbot, messages: list[dict[str, Any]], options: Options) -> None:
    """Print the answer to stdout piece by piece; until the first one comes, how much of the prompt is read."""
    with show.busy("looking and reading") as progress:
        pieces = bot.stream(messages, options, progress=progress)
        text = next((chunk.text for chunk in pieces if chunk.text), "")
    print(text, end="", flush=True)
    for chunk in pieces:
        print(chunk.text, end="", flush=True)
    print()


def report(bot: Chatbot, options: Options, answers: list[Answer]) -> dict[str, Any]:
    """What --json prints: the fields of the answer, or a list of them under `answers` where several were asked for."""
    source: dict[str, Any] = {"model": bot.source.name, "preset": options.preset}
    if options.n > 1:
        return source | {"answers": [dataclasses.asdict(answer) for answer in answers]}
    return source | dataclasses.asdict(answers[0])
