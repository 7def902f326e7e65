"""The world's benchmark: questions with exact answers about unseen scenes, from image files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from llava_interleave.errors import DataError
from llava_interleave.evals.run import run
from llava_interleave.evals.task import AnswerFn, Example, Task
from llava_interleave.journal import Journal, JsonRow
from llava_interleave.options import unknown

from .data import VIDEO_FRAMES, exam, render
from .draw import COLOURS, DIGITS, LETTERS, SHAPES, SOLIDS, write_video
from .episodes import FRAMES, LEVELS, SCENARIOS, Episode
from .refusal import HELD_OUT_ABOUT_IMAGES, HELD_OUT_CHAT, REFUSAL, of_the_world
from .styles import restyled

SIZE = 256  # pixels a side of the files
ROOM = 20  # tokens of an answer for each frame: the longest tells what is in every one
GROUNDS = (
    "navy", "midnightblue", "darkblue", "indigo", "purple", "maroon", "brown", "olive", "darkgreen",
    "teal", "darkslategray", "steelblue", "skyblue", "salmon",
)  # fmt: skip
"""Dark and saturated colors of CSS."""
FAR = 170  # levels, summed over channels, between a ground and what is on it


@dataclass(slots=True)
class Score:
    """Correct answers of one scenario; kinds: (correct, count) of each kind of question.

    refused: answers that are the refusal.
    """

    correct: int = 0
    count: int = 0
    refused: int = 0
    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)
    wrong: list[tuple[int, str, str, str]] = field(
        default_factory=list
    )  # number, question, truth, answer

    @property
    def accuracy(self) -> float:
        return self.correct / self.count


def messages(
    ep: Episode, question: str, folder: Path, name: str, *, styled: bool = False, names: bool = True
) -> list[dict[str, Any]]:
    """The question as a user's message: PNG files, named views, or an H.264 file.

    A video that tells more than the frames of training can show says how many are to be looked at.
    styled: in another drawing style. names: of views; without, they are images in their order.
    """
    if ep.clip is not None:
        frames = tuple(ep.clip(i / (VIDEO_FRAMES - 1)) for i in range(VIDEO_FRAMES))
        shown = replace(ep, scenes=frames)
    else:
        shown = ep
    rng = Random(f"exam style {name}")
    images = restyled(rng, shown) if styled else render(shown, SIZE)
    parts: list[dict[str, Any]]
    if ep.clip is not None:
        path = folder / f"{name}.mp4"
        even = images[0].width // 2 * 2, images[0].height // 2 * 2
        write_video([np.asarray(image.crop((0, 0, *even))) for image in images], path)
        parts = [
            {"type": "video", "path": str(path)}
            | ({"frames": len(ep.scenes)} if len(ep.scenes) > FRAMES else {})
        ]
    else:
        paths = [folder / f"{name}-{i}.png" for i in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            image.save(path, compress_level=1)
        if ep.names and names:
            views = dict(zip(ep.names, map(str, paths), strict=True))
            parts = [{"type": "views", "views": views}]
        else:
            parts = [{"type": "image", "path": str(path)} for path in paths]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def examples(
    scenario: str,
    count: int,
    *,
    held_out: bool,
    level: str = "normal",
    styled: bool = False,
    names: bool = True,
) -> list[Example]:
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
                ask=lambda folder, ep=ep, text=text, number=number: messages(  # type: ignore[misc]
                    ep, text, folder, f"{scenario}-{number}", styled=styled, names=names
                ),
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
    wordings that are held out of training. styled: in other drawing styles. names: of views, which
    preset hf has not; without, they are images in their order.
    """

    def __init__(
        self,
        *,
        questions: int = 500,
        scenario: str = ",".join(SCENARIOS),
        level: str = "normal",
        held_out: bool = False,
        styled: bool = False,
        names: bool = True,
    ) -> None:
        scenarios = scenario.split(",")
        for name in scenarios:
            if name not in SCENARIOS:
                raise unknown("scenario", name, SCENARIOS)
        if level not in LEVELS:
            raise unknown("level", level, LEVELS)
        wordings = "held-out wordings" if held_out else "training wordings"
        wordings += ", other styles" * styled
        # Training shows FRAMES frames of a video; questions of a level with more name their number.
        super().__init__(
            name="world",
            examples=[
                example
                for name in dict.fromkeys(scenarios)
                for example in examples(
                    name, questions, held_out=held_out, level=level, styled=styled, names=names
                )
            ],
            max_new_tokens=ROOM * LEVELS[level].frames,
            data=f"{wordings}, level {level}",
            note=f"{wordings}, level {level}",
            fixed_frames=LEVELS[level].frames > FRAMES,
        )


class Plain(Task):
    """One or two squares or circles of any size at any place of a white canvas, as Pillow draws
    them: `llava eval recipes.tiny_world.benchmark:Plain`. Right are answers that name color and
    shape of all, and nothing else.

    varied: on canvases of 100 to 2,000 pixels, some black, grey or of another color, half of the
    images with smooth edges, a third with outlines, a third as JPEG. grounds: `GROUNDS` in turn
    instead of white ones, a group of results each.
    """

    def __init__(self, *, questions: int = 60, varied: bool = False, grounds: bool = False) -> None:
        found = []
        for number in range(questions):
            rng = Random(f"{'varied' if varied else 'plain'} {number}")
            ground = GROUNDS[number % len(GROUNDS)] if grounds else ""
            image, truth = squares_and_circles(rng, varied=varied, ground=ground)
            media = [
                {"type": "image", "image": image},
                {"type": "text", "text": "What do you see?"},
            ]
            found.append(
                Example(
                    id=f"plain/{number}",
                    group=ground or ("one", "two")[len(truth) - 1],
                    kind="",
                    ask=lambda _, media=media: [{"role": "user", "content": media}],  # type: ignore[misc]
                    question="What do you see?",
                    truth=", ".join(truth),
                    scorer=lambda answer, truth=truth: float(names(answer) == truth),  # type: ignore[misc]
                )
            )
        super().__init__(name="plain", examples=found, max_new_tokens=80)


def squares_and_circles(
    rng: Random, *, varied: bool = False, ground: str = ""
) -> tuple[Image.Image, list[str]]:
    """The image, and colors and shapes in alphabetical order.

    ground: a color's name; the shapes have colors that are far from it.
    """
    side = rng.choice((200, 256, 336, 480))
    drawn, smooth, outline, jpeg, colours = "white", 1, 0.0, False, sorted(COLOURS)
    if varied:
        side = rng.choice((100, 150, 300, 512, 800, 1280, 2000))
        drawn = rng.choice(("white", "white", "black", "lightgray", "beige", "navy"))
        smooth, jpeg = rng.choice((1, 4)), rng.random() < 1 / 3
        outline = rng.choice((0.0, 0.0, 0.01))
    if ground:
        colours = [name for name in colours if distance(name, ground) > FAR]
    elif drawn == "navy":
        colours = sorted(set(COLOURS) - {"blue", "purple"})
    image = Image.new("RGB", (side * smooth, side * smooth), ground or drawn)
    pen = ImageDraw.Draw(image)
    taken: list[tuple[float, float, float]] = []
    truth: list[str] = []
    count = rng.choice((1, 2))
    for colour in rng.sample(colours, count):
        while True:
            radius = rng.uniform(0.05, (0.4, 0.24)[count - 1])
            x, y = (rng.uniform(radius, 1 - radius) for _ in range(2))
            if all(max(abs(x - a), abs(y - b)) > radius + r for a, b, r in taken):
                break
        taken.append((x, y, radius))
        box = [round(image.width * v) for v in (x - radius, y - radius, x + radius, y + radius)]
        kind = rng.choice(("square", "circle"))
        draw = pen.rectangle if kind == "square" else pen.ellipse
        draw(box, fill=colour, outline="black", width=round(outline * image.width))
        truth.append(f"{colour} {kind}")
    image = image.reduce(smooth) if smooth > 1 else image
    if jpeg:
        file = BytesIO()
        image.save(file, "JPEG", quality=rng.randint(60, 95))
        image = Image.open(file)
    return image, sorted(truth)


def distance(one: str, other: str) -> int:
    """Between two named colors: the sum of the differences of their channels."""
    pairs = zip(ImageColor.getrgb(one), ImageColor.getrgb(other), strict=True)
    return sum(abs(a - b) for a, b in pairs)


def names(answer: str) -> list[str]:
    """What of the world an answer names, in alphabetical order."""
    kinds = "|".join((*SHAPES, *SOLIDS, *DIGITS, *LETTERS))
    return sorted(re.findall(rf"(?:{'|'.join(COLOURS)}) (?:{kinds})\b", answer))


class Refusals(Task):
    """What the model refuses: images that are not of the world, and chat without an image or
    next to a scene: `llava eval recipes.tiny_world.benchmark:Refusals --task-option images=FOLDER`.

    images: the folder `held_out` of `other_images`; half of the images are of sources that training
    never sees, whose names begin with "new-". count: of images.
    """

    def __init__(self, *, images: str, count: int = 300) -> None:
        files = [
            sorted(path for path in Path(images).rglob("*.png") if new == is_new(path))
            for new in (False, True)
        ]
        if min(map(len, files)) < count // 2:
            raise DataError(
                f"{images} has {len(files[0])} images of the sources of training and "
                f"{len(files[1])} of others, and {count // 2} of each are asked about: "
                "python -m recipes.tiny_world.other_images fetches them"
            )
        found: list[Example] = []
        for new, paths in enumerate(files):
            for number, path in enumerate(fairly(paths, count // 2)):
                rng = Random(f"refusal {new} {number}")
                lot, question = rng.random(), of_the_world(rng)
                if lot < 0.5:
                    question = rng.choice(HELD_OUT_ABOUT_IMAGES)
                elif lot < 0.7:
                    question = "Describe the image."
                media = [{"type": "image", "path": str(path)}]
                group = "images of new sources" if new else "new images"
                found.append(refused(f"{group}/{number}", group, path.parent.name, question, media))
        for number, question in enumerate(HELD_OUT_CHAT):
            found.append(refused(f"chat/{number}", "chat", "alone", question, []))
        for number, question in enumerate(HELD_OUT_CHAT):
            ep, *_ = exam("single", 5000 + number, held_out=False)
            scene = [{"type": "image", "image": image} for image in render(ep, SIZE)]
            found.append(
                refused(f"beside/{number}", "chat next to a scene", "beside", question, scene)
            )
        super().__init__(name="refusals", examples=found, max_new_tokens=80)


def is_new(path: Path) -> bool:
    return path.parent.name.startswith("new-")


def fairly(paths: Sequence[Path], count: int) -> list[Path]:
    """`count` paths, as evenly from their folders as they have enough."""
    folders: dict[str, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent.name, []).append(path)
    for name, some in folders.items():
        Random(name).shuffle(some)
    depth = max(map(len, folders.values()))
    dealt = [some[i] for i in range(depth) for some in folders.values() if i < len(some)]
    return sorted(dealt[:count])


def refused(
    name: str, group: str, kind: str, question: str, media: Sequence[dict[str, Any]]
) -> Example:
    content = [*media, {"type": "text", "text": question}]
    return Example(
        id=name,
        group=group,
        kind=kind,
        ask=lambda _: [{"role": "user", "content": content}],
        question=question,
        truth=REFUSAL,
        scorer=lambda answer: float(answer == REFUSAL),
    )


def scored(rows: Sequence[JsonRow]) -> Score:
    """The score of the rows of one scenario, in order."""
    score, kinds = Score(), Counter[tuple[str, bool]]()
    for row in rows:
        good = row["score"] == 1.0
        score.count += 1
        score.correct += good
        score.refused += row["answer"] == REFUSAL
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
