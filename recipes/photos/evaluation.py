"""Questions about hand-labelled photos that training never saw:
`llava eval recipes.photos.evaluation:PhotosTask --task-option folder=PACKAGES -m photos`.

alone: the main thing is named, by any of its names. which: which of four images shows it. same: do
two photos show the same kind of thing. present, absent: is there a ...; of what is absent the
thing of another photo (POPE's random negatives; Li et al. 2023, arXiv 2305.10355).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

from llava_interleave.evals.task import Example, Task, digest, example
from llava_interleave.options import unknown

from .classes import a
from .sources import EVALUATION, Photo, evaluation

ALONE = ("What is this?", "What is in the photo?", "What does the image show?",
         "What is the main thing in this picture?")  # fmt: skip
SEED, WHICH, PAIRS = 5, 120, 100


def named(names: Sequence[str]) -> Callable[[str], float]:
    """1 for an answer with one of the names as a word, singular or plural."""
    pattern = "|".join(rf"{re.escape(name)}(?:s|es)?" for name in names)

    def score(answer: str) -> float:
        return float(re.search(rf"\b(?:{pattern})\b", answer, re.IGNORECASE) is not None)

    return score


def number(right: int) -> Callable[[str], float]:
    """1 for an answer whose last number of an image is the right one."""

    def score(answer: str) -> float:
        found = re.findall(r"\b([1-4])\b", answer)
        return float(bool(found) and int(found[-1]) == right)

    return score


def verdict(*words: str) -> Callable[[str], float]:
    """1 for an answer whose first yes, no, same or different is one of the words."""

    def score(answer: str) -> float:
        found = re.search(r"\b(yes|no|same|different)\b", answer.lower())
        return float(found is not None and found[1] in words)

    return score


class PhotosTask(Task):
    """The task over the packages in a folder, as `recipes.photos.sources` fetches them.

    group: one of the groups above instead of all.
    """

    def __init__(self, folder: str, group: str = "") -> None:
        found = examples(evaluation(Path(folder)))
        groups = {one.group for one in found}
        if group and group not in groups:
            raise unknown("group", group, sorted(groups))
        super().__init__(
            name="photos",
            examples=[one for one in found if group in ("", one.group)],
            max_new_tokens=64,
            data=digest(EVALUATION),
        )


def sets_of_four(photos: Sequence[Photo], rng: Random) -> Iterator[tuple[Photo, list[Photo]]]:
    """A photo, and it among three of other things, `WHICH` times."""
    for photo in rng.sample(list(photos), WHICH):
        four = [photo, *_others(photos, photo, 3, rng)]
        rng.shuffle(four)
        yield photo, four


def examples(photos: Sequence[Photo]) -> list[Example]:
    rng = Random(SEED)
    found: list[Example] = []

    def add(
        kind: str, shown: Sequence[Photo], text: str, truth: str, score: Callable[[str], float]
    ) -> None:
        media = [{"type": "image", "path": str(photo.path)} for photo in shown]
        name = f"{kind}-{sum(one.group == kind for one in found)}"
        found.append(example(name, kind, media, text, truth, score))

    for index, photo in enumerate(photos):
        truth = " / ".join(photo.names)
        add("alone", [photo], ALONE[index % len(ALONE)], truth, named(photo.names))
    for photo, four in sets_of_four(photos, rng):
        right = four.index(photo) + 1
        add("which", four, f"Which image shows the {photo.names[0]}?", str(right), number(right))
    twins = [(p, q) for p in photos for q in photos if p is not q and p.names[0] == q.names[0]]
    for pair in rng.sample(twins, PAIRS // 2):
        add(
            "same",
            pair,
            "Do both images show the same kind of thing?",
            "yes",
            verdict("yes", "same"),
        )
    for photo in rng.sample(list(photos), PAIRS // 2):
        two = [photo, *_others(photos, photo, 1, rng)]
        question = "Do both images show the same kind of thing?"
        add("different", two, question, "no", verdict("no", "different"))
    for photo in photos:
        name = photo.names[0]
        add("present", [photo], f"Is there {a(name)} in the image?", "yes", verdict("yes"))
        (other,) = _others(photos, photo, 1, rng)
        absent = other.names[0]
        add("absent", [photo], f"Is there {a(absent)} in the image?", "no", verdict("no"))
    return found


def _others(photos: Sequence[Photo], but: Photo, count: int, rng: Random) -> list[Photo]:
    """Photos of other things, which have no name in common."""
    found: list[Photo] = []
    for photo in rng.sample(list(photos), len(photos)):
        taken = {name for one in (but, *found) for name in one.names}
        if not taken & set(photo.names):
            found.append(photo)
        if len(found) == count:
            break
    return found
