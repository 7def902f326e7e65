"""Start of a training run at the size of M4-Instruct: seconds, and bytes of memory a sample.

`python bench/train_data.py --folder DIR` writes images and 1.2 million samples of 0 to 3 of them
into DIR, prepares them twice, and prints one line of JSON each. Of the 600,000 images 2,000 have
contents of their own, and the others are hard links to them: an image is opened, read and hashed as
any other, but comes from the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from llava_interleave.testing import tiny_checkpoint
from llava_interleave.train.data.packing import PlannedPackedDataset, Position
from llava_interleave.train.data.samples import SampleFormat, Samples
from llava_interleave.train.prepare import prepare_samples
from llava_interleave.train.recipe import Recipe

DISTINCT = 2000
WORDS = ["the", "image", "shows", "two", "lamps", "on", "a", "table", "next", "to", "books"]


def write(folder: Path, samples: int, images: int, size: int) -> None:
    """Images in folders of 1,000, blurred noise."""
    noise = np.random.default_rng(0)
    for number in range(images):
        path = folder / "images" / str(number // 1000) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < DISTINCT:
            blocks = noise.integers(0, 255, (8, 8, 3), "u1")
            Image.fromarray(blocks).resize((size, size)).save(path)
        else:
            first = number % DISTINCT
            os.link(folder / "images" / str(first // 1000) / f"{first}.jpg", path)
    random = Random(0)
    with (folder / "samples.json").open("w") as file:
        for number in range(samples):
            shown = [random.randrange(images) for _ in range(number % 4)]
            text = " ".join(random.choices(WORDS, k=30))
            turns = [
                {"from": "human", "value": "<image>\n" * len(shown) + f"What is it? {text}"},
                {"from": "gpt", "value": " ".join(random.choices(WORDS, k=40))},
            ]
            names = [f"images/{image // 1000}/{image}.jpg" for image in shown]
            row = {"id": number, "image": names, "conversations": turns}
            row |= {"metadata": {"dataset": f"set-{number % 41}"}}
            file.write(("[" if number == 0 else ",\n") + json.dumps(row))
        file.write("]\n")


def memory(name: str) -> int:
    """Bytes of this process: RssAnon, what it holds; VmHWM, the most with files that it maps."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_200_000)
    parser.add_argument("--images", type=int, default=600_000)
    parser.add_argument("--size", type=int, default=64, help="pixels of an image's side")
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    folder: Path = given.folder
    if not (folder / "samples.json").exists():
        tiny_checkpoint(folder / "tiny")
        write(folder, given.samples, given.images, given.size)
    recipe = Recipe(model=str(folder / "tiny"), source=folder / "samples.json", epochs=1)
    for name in ("first", "again"):
        before, began = memory("RssAnon"), time.perf_counter()
        form = SampleFormat(images_first_ratio=0.5)
        training, _ = prepare_samples(recipe, folder / "tiny", form, folder / "out", print)
        prepared = time.perf_counter() - began
        samples = Samples(training, folder / "tiny", 0, form)
        plan = PlannedPackedDataset(samples, len(training), size=128, tokens=8192, seed=0)
        next(plan.read(Position()))
        held = (memory("RssAnon") - before) / len(training)
        planned = time.perf_counter()
        steps = plan.steps(4) if name == "first" else 0
        line = {"start": name, "seconds": round(prepared, 1), "bytes_a_sample": round(held)}
        line |= {"steps": steps, "planning_seconds": round(time.perf_counter() - planned, 1)}
        print(json.dumps(line | {"peak_bytes_a_sample": round(memory("VmHWM") / len(training))}))


if __name__ == "__main__":
    main()
