"""Run a task: every example once, in batches; the rows of a batch are on the disk before the next
one.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import DataError, LlavaError
from ..journal import Journal, JsonRow
from .task import AnswerFn, Example, Messages, Reply, Task

PREVIOUS_TURN_FAILED = "the previous turn could not be answered"


def about(task: Task, settings: dict[str, Any]) -> dict[str, Any]:
    """The first line of a results file: task, data, settings and versions."""
    versions = {"python": platform.python_version()}
    for name in ("llava-interleave", "torch", "numpy", "pillow", "av", "tokenizers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {"task": task.name, "data": task.data, **settings, "versions": versions}


def run(
    task: Task,
    answer: AnswerFn,
    journal: Journal,
    *,
    batch_size: int = 50,
    progress: Callable[[int, int], None] | None = None,
) -> list[JsonRow]:
    """Answer the examples that the journal lacks; return the rows of all examples, in the task's
    order.

    An example that cannot be answered has its reason in `error` and scores as an empty answer.
    progress: called with the number of finished examples, and of all.
    """
    examples = {example.id: example for example in task.examples}
    assert len(examples) == len(task.examples), "ids are unique"
    for name in examples.keys() & journal.done.keys():
        row = journal.row(name)
        if (row["question"], row["truth"]) != (examples[name].question, examples[name].truth):
            raise DataError(
                f"{journal.path} has {name} with another question or truth than the task; choose "
                "another file"
            )
    waiting = [example for example in task.examples if example.id not in journal.done]
    while waiting:
        if progress:
            progress(len(examples) - len(waiting), len(examples))
        ready = [
            example for example in waiting if not example.follows or example.follows in journal.done
        ][:batch_size]
        with TemporaryDirectory() as folder:
            conversations = {
                example.id: _conversation(example, examples, journal, Path(folder))
                for example in ready
            }
            answers = iter(answer([m for m in conversations.values() if m is not None]))
            journal.add(
                [
                    _row(
                        e,
                        next(answers)
                        if conversations[e.id] is not None
                        else LlavaError(PREVIOUS_TURN_FAILED),
                    )
                    for e in ready
                ]
            )
            assert next(answers, None) is None, "one answer to each conversation"
        waiting = [example for example in waiting if example.id not in journal.done]
    if progress:
        progress(len(examples), len(examples))
    return [journal.row(name) for name in examples]


def _conversation(
    example: Example, examples: dict[str, Example], journal: Journal, folder: Path
) -> Messages | None:
    """All messages up to the example's question; None if an earlier one has no answer."""
    if not example.follows:
        return list(example.ask(folder))
    previous = _conversation(examples[example.follows], examples, journal, folder)
    row = journal.row(example.follows)
    if previous is None or row["error"]:
        return None
    return [*previous, {"role": "assistant", "content": row["answer"]}, *example.ask(folder)]


def _row(example: Example, answer: str | Reply | LlavaError) -> JsonRow:
    """The row of an example; `logprob` and `yes` only where the answer has them."""
    failed = isinstance(answer, LlavaError)
    reply = answer if isinstance(answer, Reply) else Reply("" if failed else str(answer))
    text, known = reply.text, {"logprob": reply.logprob, "yes": reply.yes}
    names = {
        "id": example.id,
        "group": example.group,
        "kind": example.kind,
        "question": example.question,
    }
    score = example.scorer(text)
    return {
        **names,
        "truth": example.truth,
        "answer": text,
        "score": score,
        "error": str(answer) if failed else None,
        **{name: value for name, value in known.items() if value is not None},
    }


def scored_rows(rows: Iterable[JsonRow]) -> list[JsonRow]:
    """The rows whose score counts."""
    return [row for row in rows if row["score"] is not None]
