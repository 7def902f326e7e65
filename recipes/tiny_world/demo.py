"""The files of `llava demo`: episodes that neither training nor the benchmark has.

`python -m recipes.tiny_world.demo llava_interleave/demo_files` writes the package's copy.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from .data import VIDEO_FRAMES, render
from .draw import draw, write_video
from .episodes import Episode, episode
from .questions import ask

SIZE = 384  # pixels a side of the files


@dataclass(frozen=True, slots=True)
class Exhibit:
    """One section: the first episode of `scenario` that has these files and kinds of questions.

    chat: the questions follow each other in one conversation.
    """

    title: str
    scenario: str
    files: tuple[str, ...]
    about: tuple[str, ...]
    chat: bool = False

    def episode(self) -> Episode:
        drawn = (
            episode(self.scenario, Random(f"demo {self.files[0]} {number}"))
            for number in range(10_000)
        )
        return next(e for e in drawn if self._fits(e))

    def _fits(self, ep: Episode) -> bool:
        images = 1 if ep.clip else len(ep.scenes)
        kinds = {question.about for question in ep.questions}
        return images == len(self.files) and kinds >= set(self.about)


EXHIBITS = (
    Exhibit("one image", "single", ("shapes.png",), ("count", "relation", "at")),
    Exhibit("reading", "single", ("letters.png",), ("read", "digit", "letter")),
    Exhibit("two images", "multi", ("before.png", "after.png"), ("changed", "which")),
    Exhibit("a video", "video", ("clip.mp4",), ("event", "faster", "direction")),
    Exhibit(
        "one scene from four sides",
        "views",
        ("front.png", "right.png", "back.png", "left.png"),
        ("total", "hidden", "behind"),
    ),
    Exhibit(
        "a follow-up question",
        "multi",
        ("album-1.png", "album-2.png", "album-3.png"),
        ("which", "order_up"),
        chat=True,
    ),
)


def entry(exhibit: Exhibit) -> dict[str, Any]:
    """The exhibit as demo.json has it."""
    ep = exhibit.episode()
    chosen = [next(q for q in ep.questions if q.about == about) for about in exhibit.about]
    return {
        "title": exhibit.title,
        "files": list(exhibit.files),
        "views": exhibit.scenario == "views",
        "chat": exhibit.chat,
        "questions": [
            {"question": ask(q, Random(f"demo {q.about}")), "answer": q.answer} for q in chosen
        ],
    }


def write(folder: Path) -> None:
    """Write the images, the video and demo.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for exhibit in EXHIBITS:
        ep = exhibit.episode()
        if ep.clip:
            times = (i / (VIDEO_FRAMES - 1) for i in range(VIDEO_FRAMES))
            write_video([draw(ep.clip(t), SIZE) for t in times], folder / exhibit.files[0])
            continue
        for name, image in zip(exhibit.files, render(ep, SIZE), strict=True):
            image.save(folder / name)
    entries = json.dumps([entry(exhibit) for exhibit in EXHIBITS], indent=1)
    (folder / "demo.json").write_text(entries + "\n", "utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
