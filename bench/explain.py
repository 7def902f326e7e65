"""How often the explanation of an answer points at the thing that decides it, in the drawn world.

    python bench/explain.py [-m FOLDER] [--count 100] [--first 10000] [--layers]

Asks questions that one thing decides, of one picture and of several, and explains the model's own answers. Prints one JSON line
a scenario and choice of layers, with shares of all answers and of the right ones:

place           the hottest patch in the map of the thing's picture lies on the thing
place_chance    a patch drawn among those of the picture that have things would
map             the hottest patch in the maps of all pictures lies on it
attention       its picture has the largest share by attention
share           by leaving out (largest_change: whichever sign the change has)
image_chance    a picture drawn at random would be it

--layers compares all ranges of layers instead, by attention only.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from llava_interleave.chat import Attribution, Chatbot, load
from recipes.tiny_world.data import exam, pictures
from recipes.tiny_world.draw import Scene, owners
from recipes.tiny_world.episodes import Episode, place_of
from recipes.tiny_world.questions import Question

DECIDED = (
    "colour",
    "shape",
    "size",
    "position",
    "at",
    "exists",
    "which",
    "character_at",
    "character_of",
)
PATCH = 32  # pixels a patch where it is looked up what lies under each


def decider(ep: Episode, q: Question) -> tuple[int, int] | None:
    """The numbers of the picture with the one thing that decides a question and of that thing; None where there is none such."""
    if q.about not in DECIDED:
        return None
    found = [
        (picture, number)
        for picture, scene in enumerate(ep.scenes)
        if q.where in ("", f"image {picture + 1}")
        for number, thing in enumerate(scene.things)
        if q.kind in ("", thing.kind) and q.colour in ("", thing.colour)
        if q.thing in ("", thing.short) and q.place in ("", place_of(thing))
    ]
    return found[0] if len(found) == 1 else None


def questions(
    scenario: str, count: int, first: int
) -> Iterator[tuple[Episode, Question, str, int, int]]:
    """The first `count` questions from number `first` on that one thing decides."""
    number = first
    while count:
        ep, question, text = exam(scenario, number, held_out=False)
        number += 1
        if found := decider(ep, question):
            count -= 1
            yield ep, question, text, *found


def under(scene: Scene, grid: int) -> NDArray[np.bool_]:
    """`[things, grid * grid]`: whether a thing covers any of a patch."""
    owner = owners(scene, grid * PATCH).reshape(grid, PATCH, grid, PATCH)
    return np.stack([(owner == number).any((1, 3)).ravel() for number in range(len(scene.things))])


def judge(told: Attribution, ep: Episode, index: int, thing: int, right: bool) -> dict[str, float]:
    covered = under(ep.scenes[index], told.images[0].heat.shape[-1])
    heats = np.stack([look.heat[0].ravel() for look in told.images])
    image, patch = np.unravel_index(heats.argmax(), heats.shape)
    row = {
        "right": float(right),
        "place": float(covered[thing, heats[index].argmax()]),
        "place_chance": float(covered[thing].sum() / covered.any(0).sum()),
        "map": float(image == index and covered[thing, patch]),
        "attention": float(np.argmax([look.attention for look in told.images]) == index),
        "image_chance": 1 / len(told.images),
    }
    if told.images[0].change is not None:
        row["share"] = float(np.argmax([look.change for look in told.images]) == index)
        row["largest_change"] = float(
            np.argmax([abs(look.change or 0.0) for look in told.images]) == index
        )
    return row


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    return (
        {name: round(float(np.mean([row[name] for row in rows])), 3) for name in rows[0]}
        if rows
        else {}
    )


def run(
    bot: Chatbot,
    scenario: str,
    count: int,
    first: int,
    choices: list[tuple[int, ...] | None],
    leave_out: bool,
) -> None:
    results: dict[tuple[int, ...], list[dict[str, float]]] = {}
    for ep, question, text, index, thing in questions(scenario, count, first):
        turn = bot.turn(text, pictures(ep, 256))
        answer = bot.chat(turn, max_new_tokens=64)
        for layers in choices:
            told = bot.explain(turn, answer, layers=layers, leave_out=leave_out)
            row = judge(told, ep, index, thing, question.is_answered(answer.text))
            results.setdefault(told.layers, []).append(row)
    for layers, rows in results.items():
        right = [row for row in rows if row["right"]]
        line = {
            "scenario": scenario,
            "layers": layers,
            "n": len(rows),
            "all": means(rows),
            "n_right": len(right),
        }
        print(json.dumps(line | {"of_right": means(right)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", help="a checkpoint folder; without it the built-in model")
    parser.add_argument("--count", type=int, default=100, help="questions a scenario")
    parser.add_argument(
        "--first",
        type=int,
        default=10_000,
        help="number of the first question; those of llava eval begin at 0",
    )
    parser.add_argument("--layers", action="store_true", help="compare layers instead")
    given = parser.parse_args()
    bot = load(given.model)
    ends = range(bot.model.config.text.num_layers + 1)
    choices: list[tuple[int, ...] | None] = (
        [tuple(range(a, b)) for a, b in combinations(ends, 2)] if given.layers else [None]
    )
    for scenario in ("single", "multi"):
        run(bot, scenario, given.count, given.first, choices, leave_out=not given.layers)


if __name__ == "__main__":
    main()
