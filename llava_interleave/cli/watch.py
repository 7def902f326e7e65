"""`llava watch`: ask about a camera, a stream, a video or a growing folder, again and again."""

from __future__ import annotations

import sys
from itertools import islice
from typing import Annotated, Any

import typer

from ..errors import MediaError, OptionError
from ..options import Options
from . import flags, terminal
from .local_model import BUILTIN_MODEL, ModelFlags, with_model
from .table import SAMPLING


def register(app: typer.Typer) -> None:
    with_options = flags.with_flags("given", Options, without=SAMPLING, overrides=True)
    app.command("watch")(with_options(with_model("kv_precision", "limits")(watch)))


def watch(
    source: Annotated[
        str,
        typer.Argument(
            help="A video file, a folder that new images come into, a device (/dev/video0), an "
            "address that FFmpeg opens, or '-' for MJPEG on standard input."
        ),
    ],
    question: Annotated[str, typer.Argument(help="Asked after each frame.")],
    every: Annotated[
        float, typer.Option(min=0, help="Seconds between two frames, at least.")
    ] = 1.0,
    keep: Annotated[int, typer.Option(help="Most frames in the prompt.")] = 16,
    least: Annotated[
        int, typer.Option(help="When --keep is reached, the oldest go until so many are left.")
    ] = 8,
    above: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="For a yes/no question: print when the probability of yes goes above or below.",
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="End after so many frames. Default: with the source.")
    ] = None,
    model: ModelFlags = BUILTIN_MODEL,
    as_json: flags.Json = False,
    *,
    given: dict[str, Any],
) -> None:
    """Watch frames as they come, and print the answer to a question when it changes.

    Frames are read on this machine only. A frame that cannot be read is reported and left out.
    """
    options = Options(**given)
    if not question.strip():
        raise OptionError("the question is empty")
    bot = model.with_adapter(options.adapter, generation_config="none").load()
    from ..processing.frame_source import read_frames

    live = bot.live(keep, least, options)
    last: object = None
    for at, frame in islice(read_frames(source, every), count):
        try:
            live.see(frame, at)
        except MediaError as error:
            print(f"{at:.2f}s: {flags.describe(error)}", file=sys.stderr)
            continue
        if above is None:
            answer: object = live.ask(question).text
            line: dict[str, object] = {"at": round(at, 3), "answer": answer}
            text = f"{answer}"
        else:
            probability = live.probability(question)
            answer = probability >= above
            line = {"at": round(at, 3), "answer": answer, "probability": probability}
            text = f"{'yes' if answer else 'no'} ({probability:.0%})"
        if answer != last:
            if as_json:
                terminal.print_json(line)
                sys.stdout.flush()
            else:
                print(f"{at:.2f}s: {text}", flush=True)
        last = answer
