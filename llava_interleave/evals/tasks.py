"""Tasks by name: those of published data, the tiny world's, and custom ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from ..options import unknown
from . import custom, haystack, interleave, lmms_eval, published
from .task import Example, Task

WORLD = "recipes.tiny_world.benchmark:World"
"""Of a clone of the repository."""


def load(
    name: str,
    data: Path,
    *,
    questions: int | None = None,
    options: Sequence[str] = (),
    as_published: bool = False,
    rules: str | None = None,
) -> Task:
    """A task; of each data set only the first `questions` conversations if that is given.

    data: folder of the published files. options: of haystack, world and module:Task. as_published:
    of LLaVA-Interleave Bench. rules: lmms-eval's. Raises DataError, OptionError.
    """
    if ":" in name or name == "world":
        task = custom.load(WORLD if name == "world" else name, options)
    elif name == "haystack":
        task = custom.build(name, haystack.Haystack, options)
    elif name in interleave.FILES:
        task = interleave.load(name, data, as_published=as_published)
    elif name in published.TASKS:
        task = published.load(name, data)
    else:
        raise unknown("task", name, (*interleave.FILES, *published.TASKS, "haystack", "world"))
    if rules:
        task = lmms_eval.rescored(task)
    if not task.examples:
        raise DataError(f"all samples of {name} are broken; --check says why")
    if questions is None:
        return task
    counts: dict[str, int] = {}
    chosen: dict[str, Example] = {}
    for example in task.examples:
        if example.follows in chosen or (
            not example.follows and counts.get(example.group, 0) < questions
        ):
            chosen[example.id] = example
            counts[example.group] = counts.get(example.group, 0) + (not example.follows)
    return task.but(examples=list(chosen.values()))
