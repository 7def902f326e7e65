"""Shared by tests of training: a benchmark of four questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from llava_interleave.evals.task import Task, example

NUMBERS = f"{__name__}:Numbers"


def graded(answer: str) -> float:
    return sum(map(ord, answer)) % 8 / 8


class Numbers(Task):
    """Two groups of questions, one with an image."""

    def __init__(self, answer: str = "Blue.") -> None:
        examples = [
            example(f"{group}-{n}", group, media, f"Which colour has {n}?", answer, graded)
            for group, media in (("text", []), ("image", drawn))
            for n in range(2)
        ]
        super().__init__(name="numbers", examples=examples, max_new_tokens=4)


def drawn(folder: Path) -> list[dict[str, Any]]:
    path = folder / f"{len(list(folder.iterdir()))}.png"
    Image.new("RGB", (30, 30), "blue").save(path)
    return [{"type": "image", "path": str(path)}]
