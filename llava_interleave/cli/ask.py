"""`llava ask`: one question, one answer."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from ..options import Options
from . import flags, terminal
from .local_model import BUILTIN_MODEL, ModelFlags, with_model

if TYPE_CHECKING:
    from ..chat import Answer, Chatbot


def register(app: typer.Typer) -> None:
    command = with_model("kv_precision", "limits", "generation_config")(ask)
    app.command("ask")(flags.with_options(command))


def ask(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="QUESTION [FILE...]",
            help="The question, or '-' for standard input; <image> places an attachment. "
            "Files are attached too, also where a shell expands -a *.png.",
        ),
    ],
    attach: flags.Attach = None,
    view: flags.View = None,
    frames_of: flags.FramesOf = None,
    model: ModelFlags = BUILTIN_MODEL,
    as_json: flags.Json = False,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print the answer as it is generated.")
    ] = True,
    attribution: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Write an attribution report: each image's share in the answer, with heat maps.",
        ),
    ] = None,
    *,
    given: dict[str, Any],
) -> None:
    """Ask about images, videos, folders of frames and views."""
    options = Options(**given)
    question, files = flags.question_and_files(words)
    files = [*(attach or []), *files]
    if question == "-" and "-" in files:
        raise OptionError("standard input can be the question or an attachment, not both")
    if options.logprobs is not None and not as_json:
        raise OptionError("--logprobs are reported with --json")
    if question == "-":
        question = sys.stdin.read().removeprefix("\ufeff").strip()
    sources = flags.attachments(files, view, frames_of)
    if attribution is not None and (options.n > 1 or not sources):
        raise OptionError(
            "--attribution attributes one answer to its images: "
            + ("leave out -n" if options.n > 1 else "attach one")
        )
    bot = model.with_adapter(options.adapter).load()
    options = bot.options(changes=given)
    messages = bot.turn(question, sources)
    if stream and options.n == 1 and not as_json and not options.cite:
        answers = [print_stream(bot, messages, options)]
    else:
        with terminal.spinner("answering"):
            answers = bot.choices(messages, options)
        if as_json:
            terminal.print_json(to_json(bot, options, answers))
        else:
            print(*(answer.cited for answer in answers), sep="\n")
    if attribution is not None:
        with terminal.spinner("computing the attribution"):
            bot.attribute(messages, answers[0], options).save(attribution)
        terminal.wrote(attribution)


def print_stream(bot: Chatbot, messages: list[dict[str, Any]], options: Options) -> Answer:
    """Print the answer to stdout as it is generated; the prompt's progress goes to stderr."""
    with terminal.spinner("encoding the prompt") as progress:
        chunks = bot.stream(messages, options, progress=progress)
        chunk = next(chunk for chunk in chunks if chunk.text or chunk.answer)
    print(chunk.text, end="", flush=True)
    for chunk in chunks:
        print(chunk.text, end="", flush=True)
    print()
    assert chunk.answer is not None
    return chunk.answer


def to_json(bot: Chatbot, options: Options, answers: list[Answer]) -> dict[str, Any]:
    """The output of --json: the answer's fields, or with -n a list of answers."""
    source: dict[str, Any] = {
        "model": bot.source.name,
        "adapter": options.adapter,
        "preset": options.preset,
    }
    if options.n > 1:
        return source | {"answers": [dataclasses.asdict(answer) for answer in answers]}
    return source | dataclasses.asdict(answers[0])
