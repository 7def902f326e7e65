"""`llava eval` and `llava world`: how well a model answers about the drawn world, and samples of it as files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import OptionError
from . import show

SCENARIOS = ("single", "multi", "video", "views")


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)
    app.command("world")(world)


def evaluate(
    task: Annotated[Literal["world"], typer.Argument(help="The benchmark: world, what the built-in model was trained for.")],
    model: show.ModelName = None,
    questions: Annotated[int, typer.Option("-n", min=1, help="Questions of each scenario.")] = 500,
    scenario: Annotated[list[str] | None, typer.Option(help="single, multi, video or views; can be given several times.")] = None,
    held_out: Annotated[bool, typer.Option(help="Ask in wordings that were kept out of training.")] = False,
    wrong: Annotated[Path | None, typer.Option(help="Write the questions answered wrongly to this file, as JSON lines.")] = None,
    revision: show.Revision = None,
    precision: show.Precision = "auto",
    device: show.Device = "auto",
    as_json: show.Json = False,
) -> None:
    """Answer questions about scenes that training never saw, from real files, and count the exact answers."""
    for name in scenario or ():
        if name not in SCENARIOS:
            raise OptionError(f"there is no scenario {name!r}; there are {', '.join(SCENARIOS)}")
    bot = show.load(model, revision, precision, device)
    from ..evals import world as bench

    def answer(asked: Sequence[list[dict[str, Any]]]) -> list[str]:
        return [a.text for a in bot.batch(asked, max_new_tokens=64)]

    assert task == "world"
    scores: dict[str, bench.Score] = {}
    for name in scenario or SCENARIOS:
        with show.busy(name) as progress:
            scores[name] = bench.evaluate(answer, name, questions, held_out=held_out, say=lambda n, go=progress: go(n, questions))  # type: ignore[misc]
    if wrong:
        rows = [(name, *row) for name, score in scores.items() for row in score.wrong]
        names = ("scenario", "number", "question", "truth", "answer")
        wrong.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    if as_json:
        print(
            json.dumps({name: dataclasses.asdict(s) | {"share": s.share, "interval": s.interval} for name, s in scores.items()})
        )
        return
    table = [
        [name, str(s.right), str(s.asked), f"{s.share:.1%}", f"{s.interval[0]:.1%} to {s.interval[1]:.1%}"]
        for name, s in scores.items()
    ]
    show.table(
        f"{bot.source.name}: the world, {'held-out' if held_out else 'training'} wordings",
        ["scenario", "right", "asked", "share", "95 % interval"],
        table,
    )


def world(
    folder: Annotated[Path, typer.Argument(help="Where to write annotations.json and the files it names.")],
    samples: Annotated[int, typer.Option("-n", min=1, help="How many samples; the scenarios take turns.")] = 8,
    size: Annotated[int, typer.Option(min=32, max=4096, help="Pixels a side.")] = 384,
    seed: Annotated[int, typer.Option(help="Other seeds draw other scenes.")] = 0,
) -> None:
    """Draw samples of the built-in model's world: pictures, videos and views with conversations, in the M4-Instruct form."""
    from ..world.data import write

    with show.busy("drawing"):
        path = write(folder, samples, size=size, seed=seed)
    print(path)
