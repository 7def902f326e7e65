"""What kinds of data, their order and their form add to a small model: the recipe of the built-in one, cut short and varied.

    make tiny
    python bench/stages.py runs/tiny [--first 400] [--then 500] [--count 250] [--out stages.json]

Every variant begins with the tower of the run in `runs/tiny` and its decoder that has learnt to describe, and is taught in two
parts, of --first and of --then steps, with the settings of the recipe's practice. Then it answers --count questions of each
scenario. One is taught with pictures before the question in half of its samples and behind it in the others; that one, and the
same without, are also asked with pictures behind the question. A JSON line for each; what is finished is not trained again.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from llava_interleave.chat import Chatbot, load
from llava_interleave.checkpoints import load as load_weights
from llava_interleave.checkpoints import save
from llava_interleave.evals.task import Messages
from llava_interleave.train import checkpointing, formats
from llava_interleave.train.loop import make, train
from llava_interleave.train.packing import PackedDataset, batches
from recipes.tiny_world import benchmark, training
from recipes.tiny_world.attention_supervision import (
    AttendedSample,
    AttentionTargets,
    join,
    look,
    looking,
)
from recipes.tiny_world.data import conversation, pictures, talk
from recipes.tiny_world.episodes import SCENARIOS, episode

ALL = ("single", *("multi", "video") * 2, *("views",) * 3)  # as often as in the recipe
ONE = ("single",)


@dataclass(frozen=True)
class Variant:
    """Scenarios of the first part and of the second, and in what share of the second pictures are behind the question."""

    first: tuple[str, ...]
    then: tuple[str, ...]
    behind: float = 0.0


VARIANTS = {
    "one picture only": Variant(ONE, ONE),
    "all from the start": Variant(ALL, ALL),
    "one picture first, then all": Variant(ONE, ALL),
    "then several pictures only": Variant(ONE, ("multi",)),
    "then video only": Variant(ONE, ("video",)),
    "then views only": Variant(ONE, ("views",)),
    "then all, in both forms": Variant(ONE, ALL, behind=0.5),
}


@dataclass(frozen=True, slots=True)
class Samples:
    """Sample number i of a part, drawn and tokenised when asked for."""

    folder: Path
    scenarios: tuple[str, ...]
    behind: float

    def __call__(self, index: int) -> AttendedSample:
        rng = Random(f"stages/{index}")
        ep = episode(rng.choice(self.scenarios), rng)
        turns = talk(ep, rng, questions=6, caption=0.1)
        shown = pictures(ep, training.VISION.image_size)
        said = conversation(ep, turns, behind=rng.random() < self.behind)
        processor = formats.processor(self.folder)
        prompt = processor.example(
            *formats.messages(
                {"conversations": said, "video" if ep.clip else "image": shown}, Path()
            )
        )
        return look(
            prompt,
            processor.tokenizer,
            AttentionTargets(ep, training.VISION.image_size, training.VISION.patch_size),
            turns,
        )


def taught(run: Path, variant: Variant, first: int, then: int) -> Path:
    """The folder of the model that a variant makes; variants that begin alike share their first part."""
    source = run / "processor"
    model = load_weights(run / "model", dtype=torch.float32).requires_grad_(True)
    make(model, training.DESCRIBE)  # freezes what is frozen
    checkpointing.weights(checkpointing.list_checkpoints(run / "describe")[-1], model)
    parts = (variant.first, 0.0, first, 0.9), (variant.then, variant.behind, then, 0.0)
    folder = run / "stages" / str(first)
    for scenarios, behind, steps, final in parts:
        folder = folder / f"{'-'.join(sorted(set(scenarios)))}-{behind:g}-{steps}"
        windows = PackedDataset(
            Samples(source, scenarios, behind),
            steps * 40,
            size=training.WINDOW,
            tokens=training.TOKENS,
            seed=1,
            join=join,
        )
        config = replace(training.PRACTISE, steps=steps, final=final)
        train(model, looking, partial(batches, windows, workers=1), config, folder)
    save(model.to(torch.bfloat16), folder / "model", processor_from=source)
    return folder / "model"


def behind(asked: Messages) -> Messages:
    """The same question with its pictures behind it."""
    *media, text = asked[0]["content"]
    return [{"role": "user", "content": [{"type": "text", "text": f"{text['text']}\n"}, *media]}]


def answerer(
    bot: Chatbot, form: Callable[[Messages], Messages]
) -> Callable[[Sequence[Messages]], list[str]]:
    return lambda asked: [
        answer.text
        for answer in bot.batch([form(one) for one in asked], max_new_tokens=benchmark.ROOM * 4)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--first", type=int, default=400)
    parser.add_argument("--then", type=int, default=500)
    parser.add_argument("--count", type=int, default=250)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, variant in VARIANTS.items():
        bot = load(taught(given.run, variant, given.first, given.then))
        forms = {"before": lambda asked: asked} | (
            {"behind": behind} if variant.then == ALL and variant.first == ONE else {}
        )
        for form, change in forms.items():
            right = {
                s: benchmark.evaluate(answerer(bot, change), s, given.count, held_out=False).share
                for s in SCENARIOS
            }
            rows.append(
                {"variant": name, "pictures": form}
                | {scenario: round(100 * share, 1) for scenario, share in right.items()}
            )
            print(json.dumps(rows[-1]), flush=True)
    if given.out:
        given.out.write_text(
            json.dumps({"arguments": vars(given), "rows": rows}, default=str, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
