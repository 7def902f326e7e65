"""The scores of lmms-eval 0.7.3, for comparison with figures made with it.

Rules of `lmms_eval/tasks/*/utils.py`, in this package's words. Prompts stay those of the task here.
docs/evaluation.md says where they differ from this package's rules, and which are right.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..errors import OptionError
from ..journal import JsonRow
from .letters import LETTERS
from .scoring import normalize, rouge_l, vqa_normalize
from .task import AggregateMetrics, Example, Task

Rule = Callable[[str, str, Sequence[str]], float | None]
"""(answer, truth, options) -> score; None for an answer that lmms-eval leaves out."""
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
MAX_CHARS = 512


def ai2d(answer: str, truth: str, _: Sequence[str]) -> float:
    """A capital with a full stop at the start, else the whole answer but for case and marks."""
    label = re.match(r"\s*([A-Z])\.", answer)
    return float((label[1] if label else answer).lower().translate(NO_PUNCTUATION) == truth.lower())


def muirbench(answer: str, truth: str, _: Sequence[str]) -> float:
    """A capital with a full stop at the start, else the whole answer but for case."""
    label = re.match(r"\s*([A-Z])\.", answer)
    return float((label[1] if label else answer).lower().strip() == truth.lower())


def blink(answer: str, truth: str, options: Sequence[str]) -> float:
    """A short first line, else the last `answer is X`, else the last `(X)`, else the first letter
    of the text, whatever word it begins.
    """
    text, offered = answer.strip(), LETTERS[: len(options)] or LETTERS
    first_line = text.split("\n", 1)[0].strip()
    short = re.match(rf"\(?([{offered}])\)?[.\s:,)]*$", first_line, re.IGNORECASE)
    if short and len(first_line) <= 4:
        return float(short[1].upper() == truth)
    stated = rf"answers?(?:\s+is)?\s*[:\-]?\s*\(?([{offered}])\)?(?![A-Za-z])"
    letters = re.findall(stated, text, re.IGNORECASE) or re.findall(rf"\(([{offered}])\)", text)
    letters = letters or re.findall(rf"\A[(\s]*([{offered}])", text, re.IGNORECASE)
    return float(bool(letters) and letters[-1].upper() == truth)


def mvbench(answer: str, truth: str, _: Sequence[str]) -> float | None:
    """The first of the letters a to e that stands alone; an empty answer is left out."""
    return float(_interleave_letter(answer) == truth) if answer else None


def mmmu(answer: str, truth: str, options: Sequence[str]) -> float:
    """The parser of MMMU: `(X)`, else `X `, else `X.`, the last one; of long answers without a
    letter the option they name. Where it draws a letter at random, the score is the mean draw's.
    """
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    text, letters = f" {answer} ", LETTERS[: len(options)]
    places: dict[str, int] = {}
    for form, last in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if not places:
            named = [letter for letter in letters if form.format(letter) in text]
            places = {letter: text.rfind(last.format(letter)) for letter in named}
    if not places and len(text.split()) > 5:
        named = [x for x, o in zip(letters, options, strict=True) if o.lower() in text.lower()]
        places = {x: text.lower().rfind(options[letters.index(x)].lower()) for x in named}
    if not places:
        return 1 / len(options)
    return float(max(places, key=lambda letter: places[letter]) == truth)


def pope(answer: str, truth: str, _: Sequence[str]) -> float:
    """The whole answer, but for case."""
    return float(answer.lower().strip() == truth)


def vqav2(answer: str, truths: Sequence[str]) -> float:
    """VQA's score with human answers normalized as the model's, also where all of them agree."""
    normalized, humans = vqa_normalize(answer), [vqa_normalize(truth) for truth in truths]
    same = [human == normalized for human in humans]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


def interleave_choice(answer: str, truth: str) -> float:
    """The first of the letters a to e that stands alone, of both texts; else the texts."""
    return float(_interleave_letter(answer) == _interleave_letter(truth))


def interleave_open(answer: str, truth: str) -> float:
    """ROUGE-L of the first 512 characters, of the texts as they are."""
    return rouge_l(answer[:MAX_CHARS], truth)


def _interleave_letter(text: str) -> str:
    if label := re.match(r"([A-E])\.\s*(?:.+)$", text.strip(), re.IGNORECASE):
        return label[1].upper()
    text = normalize(text, as_published=True)
    alone = re.search(r"\b([a-e])\b", text)
    return alone[1].upper() if alone else text


def _pope_counts(row: JsonRow) -> tuple[float, ...]:
    answer = str(row["answer"]).lower().strip()
    pairs = (("yes", "yes"), ("no", "yes"), ("no", "no"), ("yes", "no"))
    return *(float((row["truth"], answer) == pair) for pair in pairs), 1.0


POPE_METRICS = AggregateMetrics(
    _pope_counts,
    {
        "precision": lambda n: n[0] / (n[0] + n[1]),
        "recall": lambda n: n[0] / (n[0] + n[3]),
        "F1": lambda n: 2 * n[0] / (2 * n[0] + n[1] + n[3]),
        "share of yes": lambda n: (n[0] + n[1]) / n[4],
    },
)
RULES: Mapping[str, Rule] = {
    "ai2d": ai2d, "blink": blink, "muirbench": muirbench, "mvbench": mvbench, "nextqa": mmmu,
    "qbench": mmmu, "pope": pope,
}  # fmt: skip
SAME = ("docvqa",)
"""Tasks whose score is the same there."""


def rescored(task: Task) -> Task:
    """The task with the scores of lmms-eval. Raises `OptionError` for one that it does not have."""
    if task.name in SAME:
        return task
    if task.name == "vqav2" or task.name.startswith("interleave-"):
        return task.but(examples=[_other(task.name, example) for example in task.examples])
    if task.name not in RULES:
        known = ", ".join((*RULES, *SAME, "vqav2", "interleave-in", "-out", "-views"))
        raise OptionError(f"lmms-eval has no task {task.name}; --as lmms-eval is for {known}")
    rule = RULES[task.name]

    def scorer(example: Example) -> Callable[[str], float | None]:
        return lambda answer: rule(answer, example.truth, example.options)

    examples = [replace(example, scorer=scorer(example)) for example in task.examples]
    return task.but(
        examples=examples, metrics=POPE_METRICS if task.name == "pope" else task.metrics
    )


def _other(name: str, example: Example) -> Example:
    if name == "vqav2":
        return replace(example, scorer=lambda answer: vqav2(answer, example.references))
    score = interleave_open if example.kind == "open-ended" else interleave_choice
    return replace(example, scorer=lambda answer: score(answer, example.truth))
