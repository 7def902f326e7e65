"""`llava demo`: files drawn on the spot, questions about them, the model's answers beside the truth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import Options
from . import terminal

if TYPE_CHECKING:
    from recipes.tiny_world import Episode, Question

    from ..chat import Answer

SIZE = 384


@dataclass(frozen=True, slots=True)
class Exhibit:
    """Files to draw and what is asked about them: the first episode of `scenario` with as many pictures and these questions."""

    title: str
    scenario: str
    files: tuple[str, ...]
    about: tuple[str, ...]

    def episode(self) -> Episode:
        from recipes.tiny_world import episode

        # Seeds that neither training nor the evaluation has.
        drawn = (
            episode(self.scenario, Random(f"demo {self.files[0]} {number}"))
            for number in range(10_000)
        )
        return next(e for e in drawn if self._is_about(e))

    def _is_about(self, episode: Episode) -> bool:
        pictures = 1 if episode.clip else len(episode.scenes)
        return pictures == len(self.files) and {q.about for q in episode.questions} >= set(
            self.about
        )

    def questions(self, episode: Episode) -> Iterator[tuple[str, Question]]:
        """Each question in words, and with its truth."""
        from recipes.tiny_world import ask

        for about in self.about:
            question = next(q for q in episode.questions if q.about == about)
            yield ask(question, Random(f"demo {about}")), question


EXHIBITS = (
    Exhibit("one picture", "single", ("shapes.png",), ("count", "relation", "at")),
    Exhibit("reading", "single", ("letters.png",), ("read", "digit", "letter")),
    Exhibit("two pictures", "multi", ("before.png", "after.png"), ("changed", "which")),
    Exhibit("a video", "video", ("clip.mp4",), ("event", "faster", "direction")),
    Exhibit(
        "one scene from four sides",
        "views",
        ("front.png", "right.png", "back.png", "left.png"),
        ("total", "hidden", "behind"),
    ),
)
TALK = Exhibit(
    "a follow-up question",
    "multi",
    ("album-1.png", "album-2.png", "album-3.png"),
    ("which", "order_up"),
)


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    folder: Annotated[
        Path, typer.Option(help="Where the pictures and the video are written.")
    ] = Path("demo"),
    model: terminal.ModelName = None,
    revision: terminal.Revision = None,
    precision: terminal.Precision = "auto",
    device: terminal.Device = "auto",
) -> None:
    """Draw pictures, a video and views, ask about them, and show the answers beside the truth."""
    with terminal.busy("drawing"):
        episodes = [write(exhibit, folder) for exhibit in (*EXHIBITS, TALK)]
    bot = terminal.load(model, revision, precision, device)
    named = f" -m {model}" if model else ""
    options = Options(max_new_tokens=64)
    right = []
    for exhibit, episode in zip(EXHIBITS, episodes, strict=False):
        print(f"\n{exhibit.title}")
        words, views = sources(exhibit, folder)
        for text, question in exhibit.questions(episode):
            print(f'$ llava ask{named}{flags(words, views)} "{text}"')
            answer = bot.ask(text, terminal.attachments(words, views), options)
            right.append(tell(answer, question))

    print(f"\n{TALK.title}")
    words, views = sources(TALK, folder)
    print(f"$ llava chat{named}{flags(words, views)}")
    talk = bot.conversation()
    talk.attach(*words)
    times = []
    for text, question in TALK.questions(episodes[-1]):
        print(f"> {text}")
        answer = talk.ask(text, options)
        right.append(tell(answer, question))
        times.append(answer.timings.first_token)
    kept = f"{answer.usage.cached} of {answer.usage.prompt} tokens were kept from before"
    print(
        f"  {kept}: first token after {milliseconds(times[-1])} instead of {milliseconds(times[0])}"
    )
    print(f"\n{sum(right)} of {len(right)} right; the files are in {folder}")


def write(exhibit: Exhibit, folder: Path) -> Episode:
    """Draw an exhibit's files into `folder`."""
    from recipes.tiny_world import draw, write_video
    from recipes.tiny_world.data import VIDEO_FRAMES, pictures

    folder.mkdir(parents=True, exist_ok=True)
    episode = exhibit.episode()
    if episode.clip:
        frames = [draw(episode.clip(i / (VIDEO_FRAMES - 1)), SIZE) for i in range(VIDEO_FRAMES)]
        write_video(frames, folder / exhibit.files[0])
        return episode
    for name, picture in zip(exhibit.files, pictures(episode, SIZE), strict=True):
        picture.save(folder / name)
    return episode


def sources(exhibit: Exhibit, folder: Path) -> tuple[list[str], list[str]]:
    """What -a and --view say for an exhibit."""
    paths = [str(folder / name) for name in exhibit.files]
    if exhibit.scenario == "views":
        return [], [
            f"{Path(name).stem}={path}" for name, path in zip(exhibit.files, paths, strict=True)
        ]
    return paths, []


def flags(words: list[str], views: list[str]) -> str:
    return "".join(f" -a {word}" for word in words) + "".join(f" --view {view}" for view in views)


def tell(answer: Answer, question: Question) -> bool:
    """Print an answer with its truth and times; -> whether it is right."""
    text, used, took = answer.text.strip(), answer.usage, answer.timings
    right = question.is_answered(text)
    print(f"  {text}   ({'right' if right else f'WRONG: {question.told}'})")
    print(
        f"  {milliseconds(took.total)}: pictures {milliseconds(took.vision)}, first token {milliseconds(took.first_token)}; "
        f"{used.prompt} tokens, {used.cached} of them kept from before"
    )
    return right


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f} ms"
