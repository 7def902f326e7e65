"""`llava demo`: files drawn on the spot, questions about them, the model's answers beside the truth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import Options
from . import show

if TYPE_CHECKING:
    from ..chatbot import Answer
    from ..world import Episode

SIZE = 384
CLIP = 25  # steps of a video; the frames that training saw lie at every fifth
FPS = 8


@dataclass(frozen=True, slots=True)
class Exhibit:
    """Files to draw and what is asked about them: the first episode of `scenario` with as many pictures and these questions."""

    title: str
    scenario: str
    files: tuple[str, ...]
    about: tuple[str, ...]

    def episode(self) -> Episode:
        from ..world import episode

        # Training counts its episodes from integers: a text is no seed of its.
        drawn = (episode(self.scenario, Random(f"demo {self.files[0]} {number}")) for number in count())
        return next(e for e in drawn if self._pictures(e) == len(self.files) and {q.about for q in e.questions} >= set(self.about))

    def _pictures(self, episode: Episode) -> int:
        return 1 if episode.clip else len(episode.scenes)

    def questions(self, episode: Episode) -> Iterator[tuple[str, str]]:
        """The words of each question, and the true answer."""
        from ..world import ask

        for about in self.about:
            question = next(q for q in episode.questions if q.about == about)
            yield ask(question, Random(f"demo {about}")), question.answer


EXHIBITS = (
    Exhibit("one picture", "single", ("shapes.png",), ("count", "relation", "at")),
    Exhibit("reading", "single", ("letters.png",), ("read", "character_at")),
    Exhibit("two pictures", "multi", ("before.png", "after.png"), ("changed", "which")),
    Exhibit("a video", "video", ("clip.mp4",), ("event", "faster", "order_events")),
    Exhibit("one scene from four sides", "views", ("front.png", "right.png", "back.png", "left.png"), ("total", "hidden", "behind")),
)
TALK = Exhibit("a follow-up question", "multi", ("album-1.png", "album-2.png", "album-3.png"), ("which", "order_up"))


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    folder: Annotated[Path, typer.Option(help="Where the pictures and the video are written.")] = Path("demo"),
    model: show.ModelName = None,
    revision: show.Revision = None,
    precision: show.Precision = "auto",
    device: show.Device = "auto",
) -> None:
    """Draw pictures, a video and views, ask about them, and show the answers beside the truth."""
    with show.busy("drawing"):
        episodes = [write(exhibit, folder) for exhibit in (*EXHIBITS, TALK)]
    bot = show.load(model, revision, precision, device)
    named = f" -m {model}" if model else ""
    options = Options(max_new_tokens=64)
    right = asked = 0
    for exhibit, episode in zip(EXHIBITS, episodes, strict=False):
        print(f"\n{exhibit.title}")
        words, views, few = sources(exhibit, folder)
        for question, truth in exhibit.questions(episode):
            print(f'$ llava ask{named}{flags(words, views, few)} "{question}"')
            answer = bot.ask(question, show.attachments(words, views), options, frames=few)
            right, asked = right + tell(answer, truth), asked + 1

    print(f"\n{TALK.title}")
    words, views, few = sources(TALK, folder)
    print(f"$ llava chat{named}{flags(words, views, few)}")
    talk = bot.conversation()
    talk.attach(*words)
    times = []
    for question, truth in TALK.questions(episodes[-1]):
        print(f"> {question}")
        answer = talk.ask(question, options)
        right, asked = right + tell(answer, truth), asked + 1
        times.append(answer.timings.first_token)
    kept = f"{answer.usage.cached} of {answer.usage.prompt} tokens were kept from before"
    print(f"  {kept}: first token after {milliseconds(times[-1])} instead of {milliseconds(times[0])}")
    print(f"\n{right} of {asked} right; the files are in {folder}")


def write(exhibit: Exhibit, folder: Path) -> Episode:
    """Draw an exhibit's files into `folder`."""
    from PIL import Image

    from ..world import draw, write_video

    folder.mkdir(parents=True, exist_ok=True)
    episode = exhibit.episode()
    if episode.clip:
        write_video([draw(episode.clip(step / CLIP), SIZE) for step in range(CLIP + 1)], folder / exhibit.files[0], FPS)
        return episode
    for name, scene in zip(exhibit.files, episode.scenes, strict=True):
        Image.fromarray(draw(scene, SIZE)).save(folder / name)
    return episode


def sources(exhibit: Exhibit, folder: Path) -> tuple[list[str], list[str], int | None]:
    """What -a, --view and --frames say for an exhibit."""
    from ..world.episodes import FRAMES

    paths = [str(folder / name) for name in exhibit.files]
    if exhibit.scenario == "views":
        return [], [f"{Path(name).stem}={path}" for name, path in zip(exhibit.files, paths, strict=True)], None
    return paths, [], FRAMES if exhibit.scenario == "video" else None


def flags(words: list[str], views: list[str], frames: int | None) -> str:
    named = "".join(f" -a {word}" for word in words) + "".join(f" --view {view}" for view in views)
    return named + (f" --frames {frames}" if frames else "")


def tell(answer: Answer, truth: str) -> bool:
    """Print an answer with its truth and times; -> whether it is right."""
    right = answer.text.strip().rstrip(".").lower() == truth.lower()
    used, took = answer.usage, answer.timings
    print(f"  {answer.text.strip()}" + ("   (right)" if right else f"   (WRONG: {truth})"))
    print(
        f"  {milliseconds(took.total)}: pictures {milliseconds(took.vision)}, first token {milliseconds(took.first_token)}; "
        f"{used.prompt} tokens, {used.cached} of them kept from before"
    )
    return right


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f} ms"
