"""Benchmarks of the model in training."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..distributed.process_group import ProcessGroup
from ..errors import DataError, LlavaError, OptionError, with_place
from ..evals import stats, tasks
from ..evals.run import run
from ..evals.task import Messages, Task
from ..journal import Journal
from ..model import Llava
from ..prompt import Prompt
from .data import formats
from .recipe import Recipe
from .sample_generations import generate

TOGETHER = 16
"""Questions that are answered at once."""


@contextmanager
def _naming(task: str) -> Iterator[None]:
    """Errors of a task's own code as a DataError with its name and the line."""
    try:
        yield
    except (LlavaError, OSError):  # of the disk, which the loop names
        raise
    except Exception as error:
        if ":" not in task:
            raise
        raise DataError(f"the benchmark {task} raised {with_place(error)}") from error


class Benchmarks:
    """The tasks of `recipe.evaluate`, answered greedily as `llava eval` does.

    All ranks answer all questions, since they share each layer. Raises OptionError and DataError
    for a task that does not exist or cannot be read.
    """

    def __init__(self, recipe: Recipe, model: Path, out: Path, ranks: ProcessGroup) -> None:
        self.model, self.out, self.ranks = model, out, ranks
        data, questions = recipe.evaluate_data or Path("data"), recipe.evaluate_questions or None
        self.tasks = dict[str, Task]()
        for name in recipe.evaluate:
            with _naming(name):
                self.tasks[name] = tasks.load(name, data, questions=questions)
        questions_of_all = [
            (e.id, e.question) for task in self.tasks.values() for e in task.examples
        ]
        digest = hashlib.blake2b(repr(questions_of_all).encode()).hexdigest()
        if len(set(ranks.all_gather_object(digest))) > 1:
            ranks.raise_everywhere(
                OptionError(
                    f"the questions of {', '.join(self.tasks)} differ between processes: give the "
                    "task a fixed seed"
                )
            )

    def __call__(self, network: Llava, step: int) -> dict[str, float]:
        """The score of each task, by its name, and of its groups, by task/group.

        The rows are in the folder `benchmarks`, as those of `llava eval`.
        """
        metrics: dict[str, float] = {}
        for name, task in self.tasks.items():
            with TemporaryDirectory() as scratch:
                path = Path(scratch) / f"{task.name}.jsonl"
                about = {"task": task.name, "data": task.data, "step": step}
                with _naming(name), Journal(path, about) as journal:
                    answer = self._answer(network, task)
                    rows = run(task, answer, journal, batch_size=TOGETHER)
                if self.ranks.rank == 0:
                    kept = self.out / "benchmarks" / f"{name.replace(':', '.')}-{step}.jsonl"
                    kept.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, kept)
            means = [mean for mean in stats.summary(task, rows) if isinstance(mean, stats.Mean)]
            first = next((mean for mean in means if mean.kind == "average"), means[0])
            metrics[name] = first.mean
            metrics |= {f"{name}/{mean.name}": mean.mean for mean in means if mean is not first}
        return metrics

    def _answer(self, network: Llava, task: Task) -> Any:
        processor = formats.processor(self.model)

        def answer(conversations: Sequence[Messages]) -> list[str | LlavaError]:
            found: list[str | LlavaError] = []
            prompts: list[Prompt] = []
            for messages in conversations:
                try:
                    prompts.append(processor.prompt(messages, preset=task.preset))
                    found.append("")
                except LlavaError as error:
                    found.append(error)
            texts = iter(generate(network, processor, prompts, task.max_new_tokens))
            return [one if isinstance(one, LlavaError) else next(texts) for one in found]

        return answer
