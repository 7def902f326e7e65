"""Haystack: how accuracy depends on the number of images and on the place of the one that matters.

Images are drawn, so no data set is needed. Each question is asked with its needle, the image that
decides the answer, at several places among the same distractors. After MMNeedle
(arXiv 2406.11230) and Visual Haystacks (arXiv 2407.13766).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi, sin
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..errors import OptionError
from ..journal import JsonRow
from .stats import RESAMPLES, Mean
from .task import Example, Messages, Task, example

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 90, 220),
    "yellow": (240, 210, 50),
    "orange": (240, 140, 30),
    "purple": (140, 60, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
BACKGROUND, GREY = (225, 225, 220), (128, 128, 128)
SIZE, OVERSAMPLING = 384, 4
"""Pixels a side of the files, and how many times larger they are drawn."""
THINGS = 3
"""Things in each image."""
NUMBERS = (1, 2, 4, 8)
PLACES = ("first", "quarter", "middle", "three quarters", "last")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
MAX_IMAGES = 256
BLIND = "blind: images are grey"

Thing = tuple[str, str]
"""Colour and shape."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Things and their cells, 0 to 8, in an image of 3 x 3 cells; without things it is grey."""

    things: tuple[Thing, ...] = ()
    cells: tuple[int, ...] = ()

    def draw(self) -> Image.Image:
        side = SIZE * OVERSAMPLING
        image = Image.new("RGB", (side, side), BACKGROUND if self.things else GREY)
        pen = ImageDraw.Draw(image)
        for (colour, shape), cell in zip(self.things, self.cells, strict=True):
            x, y = (cell % 3 + 0.5) * side / 3, (cell // 3 + 0.5) * side / 3
            _draw(pen, shape, x, y, side * 0.12, COLOURS[colour])
        return image.reduce(OVERSAMPLING)


def _draw(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, int, int]
) -> None:
    box = (x - 0.8 * r, y - 0.8 * r, x + 0.8 * r, y + 0.8 * r)
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.9 * r), (x - r, y + 0.9 * r)], fill=fill)
    elif shape == "star":
        radii = [r if i % 2 == 0 else 0.42 * r for i in range(10)]
        angles = [i * pi / 5 for i in range(10)]
        pen.polygon(
            [(x + d * sin(a), y - d * cos(a)) for a, d in zip(angles, radii, strict=True)],
            fill=fill,
        )
    else:
        pen.rectangle((x - 0.32 * r, y - 0.92 * r, x + 0.32 * r, y + 0.92 * r), fill=fill)
        pen.rectangle((x - 0.92 * r, y - 0.32 * r, x + 0.92 * r, y + 0.32 * r), fill=fill)


def places(images: int) -> dict[str, int]:
    """Index of the needle for each name of a place; places of equal index have one name."""
    indices = {name: round(i * (images - 1) / (len(PLACES) - 1)) for i, name in enumerate(PLACES)}
    last = images - 1
    ends = {"first": 0, "last": last} if last else {"first": 0}
    inner = {i: name for name, i in reversed(indices.items()) if i not in ends.values()}
    return {"first": 0} | {inner[i]: i for i in sorted(inner)} | ends


class Haystack(Task):
    """`llava eval haystack`.

    images: numbers of images, with commas. questions: of each kind, number and place. seed: of the
    drawings.
    """

    def __init__(
        self, *, images: str | int = ",".join(map(str, NUMBERS)), questions: int = 20, seed: int = 0
    ) -> None:
        numbers = _numbers(images)
        if type(questions) is not int or questions < 1:
            raise OptionError(f"questions is a whole number from 1 on, not {questions!r}")
        examples: list[Example] = []
        for n in numbers:
            for number in range(questions):
                for kind, make in KINDS.items():
                    if kind != "which" or n > 1:
                        rng = Random(f"{seed} {kind} {n} {number}")
                        examples += make(rng, n, f"{kind} {n} {number}")
        groups = {example.group for example in examples}
        grid = {
            _count(n): {place: group(n, place) for place in PLACES if group(n, place) in groups}
            for n in numbers
        }
        columns = {
            f"needle {place}": [row[place] for row in grid.values() if place in row]
            for place in PLACES
            if sum(place in row for row in grid.values())
        }
        super().__init__(
            name="haystack",
            examples=examples,
            max_new_tokens=32,
            categories={label: list(row.values()) for label, row in grid.items()} | columns,
            average=tuple(grid),
            data=f"drawn, seed {seed}",
            note=f"{questions} questions of each kind and place",
            measures=measures,
            grid=grid,
            baselines=(BLIND,),
            logprobs=True,
        )


def _numbers(images: str | int) -> list[int]:
    try:
        numbers = [int(number) for number in str(images).split(",")]
    except ValueError as error:
        raise OptionError(f"images is numbers with commas, such as 1,2,4,8, not {images!r}") from (
            error
        )
    if not numbers or min(numbers) < 1 or max(numbers) > MAX_IMAGES:
        raise OptionError(f"numbers of images are 1 to {MAX_IMAGES}, not {images!r}")
    return list(dict.fromkeys(numbers))


def group(images: int, place: str) -> str:
    """The group of a needle's place."""
    return f"{_count(images)}, {place}"


def _count(images: int) -> str:
    return f"{images} image" + "s" * (images > 1)


def _scene(rng: Random, avoid: Sequence[Thing] = (), one: Thing | None = None) -> Scene:
    """A scene with the thing `one` and without those of `avoid`."""
    things = [one] if one else []
    while len(things) < THINGS:
        thing = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        if thing not in (*avoid, *things):
            things.append(thing)
    rng.shuffle(things)
    return Scene(tuple(things), tuple(rng.sample(range(9), THINGS)))


def _exists(rng: Random, n: int, name: str) -> list[Example]:
    """Half of the questions have a needle, the other half a distractor in its place."""
    needle = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    distractors = [_scene(rng, [needle]) for _ in range(n - 1)]
    question = f"Is there a {needle[0]} {needle[1]}?"
    found = []
    for truth, scene in (("yes", _scene(rng, one=needle)), ("no", _scene(rng, [needle]))):
        found += _examples(
            f"{name} {truth}", n, scene, distractors, lambda _, truth=truth: truth,  # type: ignore[misc]
            question, lambda truth: lambda answer: float(yes_or_no(answer) == truth),
        )  # fmt: skip
    return found


def _which(rng: Random, n: int, name: str) -> list[Example]:
    needle = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    distractors = [_scene(rng, [needle]) for _ in range(n - 1)]
    return _examples(
        name, n, _scene(rng, one=needle), distractors, lambda index: f"image {index + 1}",
        f"Which image has a {needle[0]} {needle[1]}?",
        lambda truth: lambda answer: float(image_number(answer) == image_number(truth)),
    )  # fmt: skip


def _addressed(rng: Random, n: int, name: str) -> list[Example]:
    """The question names an image by its number; each image has one thing of the shape."""
    shape = rng.choice(SHAPES)
    others = [(colour, shape) for colour in COLOURS]
    colours = rng.choices(list(COLOURS), k=n)
    scenes = [
        _scene(rng, [t for t in others if t != (colour, shape)], (colour, shape))
        for colour in colours
    ]
    return _examples(
        name, n, scenes[0], scenes[1:], lambda _: colours[0],
        lambda index: f"What colour is the {shape} in image {index + 1}?",
        lambda truth: lambda answer: float(colour_of(answer) == truth),
    )  # fmt: skip


KINDS: Mapping[str, Callable[[Random, int, str], list[Example]]] = {
    "exists": _exists,
    "which": _which,
    "addressed": _addressed,
}


def _examples(
    name: str,
    n: int,
    needle: Scene,
    distractors: Sequence[Scene],
    truth: Callable[[int], str],
    question: str | Callable[[int], str],
    scorer: Callable[[str], Callable[[str], float]],
) -> list[Example]:
    """The question with its needle at each place, and once without the images."""
    found = []
    for place, index in places(n).items():
        scenes = [*distractors[:index], needle, *distractors[index:]]
        text = question if isinstance(question, str) else question(index)
        about = text, truth(index), scorer(truth(index))
        found.append(_example(f"{name} {place}", group(n, place), scenes, *about))
        if index == 0:
            blind = [Scene()] * n
            found.append(_example(f"{name} blind", BLIND, blind, *about))
    return found


def _example(
    name: str,
    members: str,
    scenes: Sequence[Scene],
    question: str,
    truth: str,
    scorer: Callable[[str], float],
) -> Example:
    def media(folder: Path) -> Messages:
        parts = []
        for number, scene in enumerate(scenes, 1):
            path = folder / f"{name.replace(' ', '-')}-{number}.png"
            scene.draw().save(path, compress_level=1)
            parts.append({"type": "image", "path": str(path)})
        return parts

    kind = name.split()[0]
    return example(name, members, media, question, truth, scorer, kind=kind)


def yes_or_no(answer: str) -> str:
    """The first "yes" or "no" of an answer, else ""."""
    match = re.search(r"\b(yes|no)\b", answer.lower())
    return match[1] if match else ""


def image_number(answer: str) -> int:
    """The only image that an answer names, as a number or an ordinal; 0 for none or several."""
    text = answer.lower()
    found = {int(number) for number in re.findall(r"\d+", text)}
    found |= {i for i, word in enumerate(ORDINALS, 1) if re.search(rf"\b{word}\b", text)}
    return found.pop() if len(found) == 1 else 0


def colour_of(answer: str) -> str:
    """The only colour that an answer names; "" for none or several."""
    found = {colour for colour in COLOURS if re.search(rf"\b{colour}\b", answer.lower())}
    return found.pop() if len(found) == 1 else ""


def measures(rows: Sequence[JsonRow]) -> list[Mean]:
    """Place bias and order agreement, each for every number of images with several places.

    Place bias: the largest minus the smallest accuracy over the places. Order agreement: the share
    of questions whose answers at all places are the same, an image's number read as the image that
    stands there.
    """
    by_number: dict[int, dict[str, dict[str, JsonRow]]] = {}
    for row in rows:
        name, place = _split(row["id"])
        if place != "blind":
            by_number.setdefault(int(name.split()[1]), {}).setdefault(name, {})[place] = row
    found = []
    for n, questions in by_number.items():
        whole = [answers for answers in questions.values() if len(answers) == len(places(n))]
        if n == 1 or not whole:
            continue
        scores = np.array([[answers[place]["score"] for place in places(n)] for answers in whole])
        same = np.array([_agree(n, answers) for answers in whole], dtype=np.float64)
        failed = sum(bool(row["error"]) for answers in whole for row in answers.values())
        statistics: tuple[tuple[str, Any, Callable[[Any], Any]], ...] = (
            ("place bias", scores, lambda s: np.ptp(s.mean(axis=0))),
            ("order agreement", same, np.mean),
        )
        for label, values, of in statistics:
            rng = np.random.default_rng(0)
            drawn = [
                float(of(values[rng.integers(0, len(values), len(values))]))
                for _ in range(RESAMPLES)
            ]
            low, high = np.percentile(drawn, (2.5, 97.5))
            mean, count = float(of(values)), len(values)
            found.append(
                Mean(f"{n} images: {label}", "metric", mean, float(low), float(high), count, failed)
            )
    return found


def _split(name: str) -> tuple[str, str]:
    """A question's name and the place of its needle."""
    place = next(place for place in (*PLACES[::-1], "blind") if name.endswith(f" {place}"))
    return name.removesuffix(f" {place}"), place


def _agree(n: int, answers: Mapping[str, JsonRow]) -> bool:
    """Whether the answers at all places are the same."""
    seen = set()
    for place, index in places(n).items():
        row = answers[place]
        text: object = row["answer"].strip().rstrip(".").lower()
        if row["kind"] == "exists":
            text = yes_or_no(row["answer"]) or text
        elif row["kind"] == "addressed":
            text = colour_of(row["answer"]) or text
        elif number := image_number(row["answer"]):
            at = number - 1
            text = -1 if at == index else at - (at > index)  # -1: the needle; else its distractor
        seen.add(text)
    return len(seen) == 1
