"""Precision and recall of `find`, next to a search in captions; and what that says about answers
from a library of images.

    python bench/find.py [--images 300] [--names 12]
    python bench/find.py --photos PACKAGES [--four]

Each name is looked for among all images: drawn scenes of the built-in model's world with "Is there
a red star?", or with the model `photos` those of recipes/photos/evaluation.toml, which are labelled
by hand (PACKAGES: the folder of `python -m recipes.photos.sources`). Three
ways to score an image: the probability of yes, a caption that has the name, and the probability of
yes to "Does this image help to answer: ...?", which a library would have to ask. The first two also
answer "How many images show it?". --four: of the four photos of each question "Which image shows
the ...?" the one with the highest probability of yes is taken. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import mean

from PIL import Image

from llava_interleave import Chatbot, load
from recipes.photos.classes import a
from recipes.photos.evaluation import SEED, WHICH, sets_of_four
from recipes.photos.sources import evaluation
from recipes.tiny_world.data import render
from recipes.tiny_world.episodes import NORMAL, episode

Found = tuple[list[object], list[set[str]]]
"""Images, and the names of what each shows."""
TOP = 24


def scenes(count: int) -> Found:
    images: list[object] = []
    names = []
    for number in range(count):
        shown = episode("single", Random(f"find {number}"), NORMAL)
        (image,) = render(shown, 256)
        images.append(image)
        names.append({thing.short for thing in shown.scenes[0].things})
    return images, names


def photos(folder: Path) -> Found:
    found = evaluation(folder)
    return [Image.open(one.path).convert("RGB") for one in found], [set(one.names) for one in found]


def average_precision(ranked: Sequence[bool]) -> float:
    """Mean of the precision at each right image."""
    places = [place for place, right in enumerate(ranked, 1) if right]
    return mean(count / place for count, place in enumerate(places, 1))


def summary(
    scores: Sequence[Sequence[float]], truths: Sequence[Sequence[bool]]
) -> dict[str, float]:
    """Of all names: scores of 0.5 and more are hits; recall at 24 is of the 24 highest."""
    pairs = [
        (score >= 0.5, truth)
        for row, right in zip(scores, truths, strict=True)
        for score, truth in zip(row, right, strict=True)
    ]
    hits, right = sum(hit for hit, _ in pairs), sum(hit and truth for hit, truth in pairs)
    recalls, precisions, counts = [], [], []
    for row, truth in zip(scores, truths, strict=True):
        order = sorted(range(len(row)), key=lambda i: -row[i])
        ranked = [truth[i] for i in order]
        recalls.append(sum(ranked[:TOP]) / min(TOP, sum(truth)))
        precisions.append(average_precision(ranked))
        counts.append(sum(score >= 0.5 for score in row) == sum(truth))
    return {
        "precision": round(right / max(1, hits), 3),
        "recall": round(right / sum(truth for _, truth in pairs), 3),
        "mean average precision": round(mean(precisions), 3),
        f"recall at {TOP}": round(mean(recalls), 3),
        "counts right": round(mean(counts), 3),
    }


def measure(
    bot: Chatbot, found: Found, looked_for: Sequence[str], caption: str, inside: str
) -> dict[str, object]:
    """inside: what a question ends in."""
    images, names = found
    truths = [[name in shown for shown in names] for name in looked_for]
    columns: dict[str, tuple[str, type]] = {"caption": (caption, str)}
    for name in looked_for:
        columns[name] = f"Is there {a(name)}{inside}?", bool
        columns["helps " + name] = (
            f"Does this image help to answer: Which images show {a(name)}?",
            bool,
        )
    rows = list(bot.each(images, columns, max_new_tokens=64))

    def yes(column: str) -> list[float]:
        cells = [row[column] for row in rows]
        return [one.probability if one.value else 1 - one.probability for one in cells]

    captions = [str(row["caption"].value).lower() for row in rows]
    patterns = [re.compile(rf"\b{re.escape(name)}(s|es)?\b") for name in looked_for]
    return {
        "images": len(images),
        "names": len(looked_for),
        "find": summary([yes(name) for name in looked_for], truths),
        "captions": summary(
            [[float(bool(p.search(text))) for text in captions] for p in patterns], truths
        ),
        "helps to answer": summary([yes("helps " + name) for name in looked_for], truths),
    }


def of_four(bot: Chatbot, folder: Path) -> dict[str, object]:
    """The questions of `recipes.photos.evaluation` about four photos, asked about each alone."""
    right = []
    for photo, four in sets_of_four(evaluation(folder), Random(SEED)):
        question = f"Is there {a(photo.names[0])} in the image?"
        hits = bot.find(question, [one.path for one in four], max_new_tokens=64)
        right.append(bool(hits) and hits[0].source == photo.path)
    return {"questions": WHICH, "right": sum(right)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=300, help="drawn scenes")
    parser.add_argument("--names", type=int, default=12, help="how many names are looked for")
    parser.add_argument("--photos", type=Path, help="look in the hand-labelled photos instead")
    parser.add_argument("--four", action="store_true", help="with --photos: which of four")
    given = parser.parse_args()
    if given.four:
        if not given.photos:
            parser.error("--four asks about the photos of --photos")
        print(json.dumps(of_four(load("photos", precision="int8"), given.photos)))
        return
    found = photos(given.photos) if given.photos else scenes(given.images)
    common = Counter(name for shown in found[1] for name in sorted(shown)).most_common()
    looked_for = [name for name, count in common if count <= TOP][: given.names]
    if given.photos:
        result = measure(load("photos"), found, looked_for, "What is this?", " in the image")
    else:
        result = measure(load(), found, looked_for, "What do you see?", "")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
