"""The world's own benchmark: questions about scenes that training never saw, from real files, with exact answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llava_interleave.evals.run import run
from llava_interleave.evals.task import Answerer, Example, Task
from llava_interleave.journal import Journal, JsonRow

from .data import VIDEO_FRAMES, exam, pictures
from .draw import draw, write_video
from .episodes import FRAMES, LEVELS, Episode

SIZE = 256  # pixels a side of the files
ROOM = 20  # tokens of an answer for each frame: the longest tells what is in every one


@dataclass(slots=True)
class Score:
    """Right answers of one scenario; `kinds` has right and asked for each kind of question, `wrong` what was missed."""

    right: int = 0
    asked: int = 0
    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)
    wrong: list[tuple[int, str, str, str]] = field(
        default_factory=list
    )  # number, question, truth, answer

    @property
    def share(self) -> float:
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the share (Wilson, 1927)."""
        z, n, p = 1.96, self.asked, self.share
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def messages(ep: Episode, question: str, folder: Path, name: str) -> list[dict[str, Any]]:
    """The question as a user asks it: PNG files in order, views with their names, a video as an H.264 file.

    A video that tells more than the frames of training can show says how many are to be looked at.
    """
    parts: list[dict[str, Any]]
    if ep.clip is not None:
        path = folder / f"{name}.mp4"
        write_video(
            [draw(ep.clip(i / (VIDEO_FRAMES - 1)), SIZE) for i in range(VIDEO_FRAMES)], path
        )
        parts = [
            {"type": "video", "path": str(path)}
            | ({"frames": len(ep.scenes)} if len(ep.scenes) > FRAMES else {})
        ]
    else:
        paths = [folder / f"{name}-{i}.png" for i in range(len(ep.scenes))]
        for path, image in zip(paths, pictures(ep, SIZE), strict=True):
            image.save(path, compress_level=1)
        if ep.names:
            views = dict(zip(ep.names, map(str, paths), strict=True))
            parts = [{"type": "views", "views": views}]
        else:
            parts = [{"type": "image", "path": str(path)} for path in paths]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def examples(scenario: str, count: int, *, held_out: bool, level: str = "normal") -> list[Example]:
    """`count` questions of a scenario, in the wordings of training or in those kept out of it. Files are drawn when asked."""
    out = []
    for number in range(count):
        ep, question, text = exam(scenario, number, held_out=held_out, level=LEVELS[level])
        out.append(
            Example(
                id=f"{scenario}/{number}",
                group=scenario,
                kind=question.about,
                ask=lambda folder, ep=ep, text=text, number=number: messages(
                    ep, text, folder, f"{scenario}-{number}"
                ),  # type: ignore[misc]
                question=text,
                truth=question.answer,
                judge=lambda said, question=question: float(question.is_answered(said)),  # type: ignore[misc]
            )
        )
    return out


def load(count: int, *, scenarios: Sequence[str], held_out: bool, level: str = "normal") -> Task:
    """The benchmark as a task: `count` questions of each scenario."""
    of_all = [
        example
        for name in scenarios
        for example in examples(name, count, held_out=held_out, level=level)
    ]
    wordings = "held-out wordings" if held_out else "training wordings"
    return Task(
        name="world",
        examples=of_all,
        max_new_tokens=ROOM * LEVELS[level].frames,
        data=f"{wordings}, level {level}",
    )


def scored(rows: Sequence[JsonRow]) -> Score:
    """The score of the rows of one scenario, in order."""
    score, kinds = Score(), Counter[tuple[str, bool]]()
    for row in rows:
        good = row["score"] == 1.0
        score.asked += 1
        score.right += good
        kinds[row["kind"], good] += 1
        if not good:
            score.wrong.append(
                (int(row["id"].split("/")[1]), row["question"], row["truth"], row["answer"])
            )
    abouts = {about for about, _ in kinds}
    score.kinds = {a: (kinds[a, True], kinds[a, True] + kinds[a, False]) for a in sorted(abouts)}
    return score


def evaluate(
    answer: Answerer,
    scenario: str,
    count: int,
    *,
    held_out: bool,
    batch: int = 50,
    say: Callable[[int], None] | None = None,
) -> Score:
    """Ask `count` questions of a scenario and score the answers, leaving no file behind."""
    with TemporaryDirectory() as folder, Journal(Path(folder) / "rows.jsonl", {}) as journal:
        task = load(count, scenarios=[scenario], held_out=held_out)
        return scored(
            run(
                task, answer, journal, batch=batch, say=(lambda done, _: say(done)) if say else None
            )
        )
