"""The rules of lmms-eval 0.7.3 that `--as lmms-eval` repeats. Values are those of its own code."""

from pathlib import Path

import pytest

from llava_interleave.errors import OptionError
from llava_interleave.evals import interleave, lmms_eval, published
from tests.helpers.benchmarks import WHOLE, bench, made

OPTIONS = ("red car", "dog", "cat", "none of them")
RULES = ("ai2d", "muirbench", "blink", "mvbench", "mmmu")
SCORES = [  # answer, truth, and the score by each of RULES; .25: a letter is drawn
    ("B", "B", 1, 1, 1, 1, 1),
    ("b", "B", 1, 1, 1, 1, 0.25),
    ("(B)", "B", 1, 0, 1, 1, 1),
    ("**B**", "B", 1, 0, 0, 1, 0.25),
    ("[B]", "B", 1, 0, 0, 1, 0.25),
    ("B. cat", "B", 1, 1, 1, 1, 1),
    ("The correct answer is (B)", "B", 0, 0, 1, 1, 1),
    ("The correct answer is (B).", "B", 0, 0, 1, 1, 1),
    ("The answer is a red cat.", "A", 0, 0, 1, 1, 0),
    ("A red cat", "A", 0, 0, 1, 1, 1),
    ("B or C", "B", 0, 0, 1, 1, 0),
    ("B or C", "C", 0, 0, 0, 0, 1),
    ("Bees", "B", 0, 0, 1, 0, 0.25),
    ("E", "A", 0, 0, 0, 0, 0.25),
    ("I think the dog is the one that moves", "B", 0, 0, 0, 0, 1),
]


@pytest.mark.parametrize(("answer", "truth", "scores"), [(a, t, s) for a, t, *s in SCORES])
def test_letters(answer: str, truth: str, scores: list[float]) -> None:
    found = [getattr(lmms_eval, rule)(answer, truth, OPTIONS) for rule in RULES]
    assert found == scores, dict(zip(RULES, found, strict=True))


def test_an_empty_answer_is_left_out_of_mvbench_alone() -> None:
    assert lmms_eval.mvbench("", "A", OPTIONS) is None
    assert lmms_eval.blink("", "A", OPTIONS) == lmms_eval.ai2d("", "A", OPTIONS) == 0


def test_vqa_normalizes_unanimous_people_too() -> None:
    assert lmms_eval.vqav2("red", ["the red"] * 10) == 1
    assert lmms_eval.vqav2("red", ["red"] * 2 + ["blue"] * 8) == pytest.approx(0.6)


def test_tasks_by_the_rules_of_lmms_eval(tmp_path: Path) -> None:
    for name in ("qbench", "pope", "vqav2", "nlvr2"):
        made(tmp_path, name)
    (example,) = lmms_eval.rescored(published.load("qbench", tmp_path)).examples
    assert (example.options, example.scorer("(B)"), example.scorer("?")) == (
        ["Blurry", "Clear"],
        1,
        0.5,
    )
    pope = lmms_eval.rescored(published.load("pope", tmp_path))
    yes, no = pope.examples[:2]
    assert (yes.scorer("Yes"), yes.scorer("Yes, it is."), no.scorer("There is no dog.")) == (
        1,
        0,
        0,
    )
    assert pope.metrics is lmms_eval.POPE_METRICS
    (one,) = lmms_eval.rescored(published.load("vqav2", tmp_path)).examples
    assert one.scorer("a skateboard") == pytest.approx(0.3)
    with pytest.raises(OptionError, match=r"lmms-eval has no task nlvr2; .* is for ai2d, blink"):
        lmms_eval.rescored(published.load("nlvr2", tmp_path))
    task = lmms_eval.rescored(interleave.load("interleave-in", bench(tmp_path, WHOLE)))
    choice = next(e for e in task.examples if e.id == "RAVEN/1/1")
    assert (choice.scorer("A. cat"), choice.scorer("the answer: a"), choice.scorer("B")) == (
        1,
        1,
        0,
    )
    opened = next(e for e in task.examples if e.id == "Spot-the-Diff/1/1")
    assert opened.scorer("A red car is gone") == pytest.approx(0.8)
