"""The world's benchmark: questions with exact answers about unseen scenes, from image files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llava_interleave.evals.run import run
from llava_interleave.evals.task import AnswerFn, Example, Task
from llava_interleave.journal import Journal, JsonRow
from llava_interleave.options import unknown

from .data import VIDEO_FRAMES, exam, render
from .draw import draw, write_video
from .episodes import FRAMES, LEVELS, SCENARIOS, Episode

SIZE = 256  # pixels a side of the files
ROOM = 20  # tokens of an answer for each frame: the longest tells what is in every one


@dataclass(slots=True)
class Score:
    """Correct answers of one scenario; kinds: (correct, count) of each kind of question."""

    correct: int = 0
    count: int = 0
    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)
    wrong: list[tuple[int, str, str, str]] = field(
        default_factory=list
    )  # number, question, truth, answer

    @property
    def accuracy(self) -> float:
        return self.correct / self.count


def messages(ep: Episode, question: str, folder: Path, name: str) -> list[dict[str, Any]]:
    """The question as a user's message: PNG files, named views, or an H.264 file.

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
        for path, image in zip(paths, render(ep, SIZE), strict=True):
            image.save(path, compress_level=1)
        if ep.names:
            views = dict(zip(ep.names, map(str, paths), strict=True))
            parts = [{"type": "views", "views": views}]
        else:
            parts = [{"type": "image", "path": str(path)} for path in paths]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def examples(scenario: str, count: int, *, held_out: bool, level: str = "normal") -> list[Example]:
    """`count` questions of a scenario, in training wordings or held-out ones.

    Files are drawn on demand.
    """
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
                scorer=lambda answer, question=question: float(question.is_answered(answer)),  # type: ignore[misc]
            )
        )
    return out


class World(Task):
    """The benchmark as a task: `llava eval recipes.tiny_world.benchmark:World`.

    questions: of each scenario. scenario: single, multi, video, views, or several with commas.
    level: easy, normal (as in training) or hard (more images, things and frames). held_out: in
    wordings that are held out of training.
    """

    def __init__(
        self,
        *,
        questions: int = 500,
        scenario: str = ",".join(SCENARIOS),
        level: str = "normal",
        held_out: bool = False,
    ) -> None:
        scenarios = scenario.split(",")
        for name in scenarios:
            if name not in SCENARIOS:
                raise unknown("scenario", name, SCENARIOS)
        if level not in LEVELS:
            raise unknown("level", level, LEVELS)
        wordings = "held-out wordings" if held_out else "training wordings"
        # Training shows FRAMES frames of a video; questions of a level with more name their number.
        super().__init__(
            name="world",
            examples=[
                example
                for name in dict.fromkeys(scenarios)
                for example in examples(name, questions, held_out=held_out, level=level)
            ],
            max_new_tokens=ROOM * LEVELS[level].frames,
            data=f"{wordings}, level {level}",
            note=f"{wordings}, level {level}",
            fixed_frames=LEVELS[level].frames > FRAMES,
        )


def scored(rows: Sequence[JsonRow]) -> Score:
    """The score of the rows of one scenario, in order."""
    score, kinds = Score(), Counter[tuple[str, bool]]()
    for row in rows:
        good = row["score"] == 1.0
        score.count += 1
        score.correct += good
        kinds[row["kind"], good] += 1
        if not good:
            score.wrong.append(
                (int(row["id"].split("/")[1]), row["question"], row["truth"], row["answer"])
            )
    abouts = {about for about, _ in kinds}
    score.kinds = {a: (kinds[a, True], kinds[a, True] + kinds[a, False]) for a in sorted(abouts)}
    return score


def evaluate(
    answer: AnswerFn,
    scenario: str,
    count: int,
    *,
    held_out: bool,
    batch: int = 50,
    say: Callable[[int], None] | None = None,
) -> Score:
    """Ask `count` questions of a scenario and score the answers, leaving no file behind."""
    with TemporaryDirectory() as folder, Journal(Path(folder) / "rows.jsonl", {}) as journal:
        task = World(questions=count, scenario=scenario, held_out=held_out)
        return scored(
            run(
                task,
                answer,
                journal,
                batch_size=batch,
                progress=(lambda done, _: say(done)) if say else None,
            )
        )
