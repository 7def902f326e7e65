"""Running a task: every example is asked once, in batches, and its row is on the disk before the next batch is asked."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import DataError, LlavaError
from ..journal import Journal, JsonRow
from .task import Answerer, Example, Messages, Task

BEFORE = "the turn before it could not be answered"


def about(task: Task, how: dict[str, Any]) -> dict[str, Any]:
    """The first line of a results file: the task, its data, how answers are made, and the versions they are made with."""
    versions = {"python": platform.python_version()}
    for name in ("llava-interleave", "torch", "numpy", "pillow", "av", "tokenizers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {"task": task.name, "data": task.data, **how, "versions": versions}


def run(
    task: Task,
    answer: Answerer,
    journal: Journal,
    *,
    batch: int = 50,
    say: Callable[[int, int], None] | None = None,
) -> list[JsonRow]:
    """Ask what the journal does not have yet; the rows of all examples, in the task's order.

    An example that cannot be answered has its reason in `error` and scores as an empty answer. say: told how many are done,
    and of how many.
    """
    examples = {example.id: example for example in task.examples}
    assert len(examples) == len(task.examples), "ids are unique"
    for name in examples.keys() & journal.done.keys():
        row = journal.row(name)
        if (row["question"], row["truth"]) != (examples[name].question, examples[name].truth):
            raise DataError(
                f"{journal.path} has {name} with another question or truth than the task has now; name another file"
            )
    waiting = [example for example in task.examples if example.id not in journal.done]
    while waiting:
        if say:
            say(len(examples) - len(waiting), len(examples))
        ready = [
            example for example in waiting if not example.follows or example.follows in journal.done
        ][:batch]
        with TemporaryDirectory() as folder:
            asked = {
                example.id: _conversation(example, examples, journal, Path(folder))
                for example in ready
            }
            said = iter(answer([messages for messages in asked.values() if messages is not None]))
            journal.add(
                [
                    _row(e, next(said) if asked[e.id] is not None else LlavaError(BEFORE))
                    for e in ready
                ]
            )
            assert next(said, None) is None, "one answer to each conversation"
        waiting = [example for example in waiting if example.id not in journal.done]
    if say:
        say(len(examples), len(examples))
    return [journal.row(name) for name in examples]


def _conversation(
    example: Example, examples: dict[str, Example], journal: Journal, folder: Path
) -> Messages | None:
    """All messages up to the example's question; None if an earlier one has no answer."""
    if not example.follows:
        return list(example.ask(folder))
    before = _conversation(examples[example.follows], examples, journal, folder)
    row = journal.row(example.follows)
    if before is None or row["error"]:
        return None
    return [*before, {"role": "assistant", "content": row["answer"]}, *example.ask(folder)]


def _row(example: Example, said: str | LlavaError) -> JsonRow:
    failed = isinstance(said, LlavaError)
    text = "" if failed else str(said)
    names = {
        "id": example.id,
        "group": example.group,
        "kind": example.kind,
        "question": example.question,
    }
    score = example.judge(text)
    return {
        **names,
        "truth": example.truth,
        "answer": text,
        "score": score,
        "error": str(said) if failed else None,
    }


def counted(rows: Iterable[JsonRow]) -> list[JsonRow]:
    """The rows whose score counts."""
    return [row for row in rows if row["score"] is not None]
