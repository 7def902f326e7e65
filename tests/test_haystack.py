"""Haystack: answerers whose accuracy by number and place is known get exactly that."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_interleave.chat.chatbot import BUILTIN
from llava_interleave.cli import remote
from llava_interleave.errors import OptionError
from llava_interleave.evals import haystack, report, run, stats
from llava_interleave.evals.calibration import Calibration
from llava_interleave.evals.haystack import COLOURS, Haystack, places
from llava_interleave.evals.task import Example, Reply
from llava_interleave.journal import Journal, JsonRow
from tests.helpers.cli import llava
from tests.helpers.server import listening

Answerer = Callable[[Example], str]


def results(task: Haystack, answer: Answerer, folder: Path) -> dict[str, float]:
    examples = {example.id: example for example in task.examples}
    waiting = iter(examples.values())
    with Journal(folder / "rows.jsonl", {}) as journal:
        rows = run.run(task, lambda batch: [answer(next(waiting)) for _ in batch], journal)
    return {mean.name: mean.mean for mean in stats.summary(task, rows)}


def kind(example: Example) -> str:
    return example.id.split()[0]


def place(example: Example) -> int:
    """Index of the needle, -1 in the blind form."""
    name, where = haystack._split(example.id)
    return -1 if where == "blind" else places(int(name.split()[1]))[where]


@pytest.fixture(scope="module")
def task() -> Haystack:
    return Haystack(images="1,2,5", questions=6)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn does not matter to these answerers."""
    monkeypatch.setattr(haystack, "SIZE", 8)


def test_the_truth_is_right_everywhere(task: Haystack, tmp_path: Path) -> None:
    found = results(task, lambda example: f"It is {example.truth}.", tmp_path)
    for name, value in found.items():
        assert value == (0 if name.endswith("place bias") else 1), name


def test_an_answerer_that_sees_the_last_image_alone(task: Haystack, tmp_path: Path) -> None:
    """It names every image correctly where the needle is last, and answers no elsewhere."""

    def answer(example: Example) -> str:
        n = int(example.id.split()[1])
        wrong = {"exists": "no", "which": "none", "addressed": "none"}[kind(example)]
        return example.truth if place(example) == n - 1 else wrong

    found = results(task, answer, tmp_path)
    assert found["5 images, last"] == 1
    # without the needle "no" is right: one of two questions of the kind exists
    assert found["5 images, first"] == found["5 images, middle"] == pytest.approx(1 / 4)
    assert found["5 images: place bias"] == pytest.approx(3 / 4)
    assert found["5 images: order agreement"] == pytest.approx(1 / 4)


def test_always_yes_is_right_in_half(tmp_path: Path) -> None:
    task = Haystack(images=4, questions=8)
    task = task.but(examples=[e for e in task.examples if kind(e) == "exists"])  # type: ignore[assignment]
    found = results(task, lambda _: "Yes", tmp_path)
    assert found["4 images, first"] == found["4 images, last"] == 0.5
    assert found["blind: images are grey"] == 0.5
    assert found["4 images: place bias"] == 0 and found["4 images: order agreement"] == 1


def test_agreement_follows_the_image_and_not_its_number(tmp_path: Path) -> None:
    """An answerer that always names the same distractor agrees, one that names "image 1" does
    not.
    """
    task = Haystack(images=5, questions=4)
    which = task.but(examples=[e for e in task.examples if kind(e) == "which"])
    first = results(which, lambda _: "image 1", tmp_path)  # type: ignore[arg-type]
    assert first["5 images: order agreement"] == 0
    other = tmp_path / "other"
    other.mkdir()
    same = results(
        which,  # type: ignore[arg-type]
        lambda e: f"image {2 if place(e) <= 0 else 1}",  # the first distractor
        other,
    )
    assert same["5 images: order agreement"] == 1
    assert same["5 images, first"] == 0


def scenes_of(example: Example) -> list[haystack.Scene]:
    """The scenes that an example draws."""
    drawn: list[haystack.Scene] = []

    def draw(scene: haystack.Scene) -> Image.Image:
        drawn.append(scene)
        return Image.new("RGB", (1, 1))

    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(haystack.Scene, "draw", draw)
        example.ask(Path(folder))
    return drawn


@pytest.mark.parametrize("seed", range(4))
def test_needles_are_unique(seed: int) -> None:
    """No other image has the needle; a shape that a question names occurs once in each image."""
    for n in (1, 3, 8):
        for name, make in haystack.KINDS.items():
            examples = make(Random(f"{seed}"), n, f"{name} {n} 0")
            scenes = scenes_of(examples[0])
            words = examples[0].question.rstrip("?").split()
            if name == "addressed":
                shape = words[words.index("the") + 1]
                assert all(sum(s == shape for _, s in scene.things) == 1 for scene in scenes)
                assert all(c in COLOURS for scene in scenes for c, _ in scene.things)
            else:
                needle = (words[-2], words[-1])
                assert sum(needle in scene.things for scene in scenes) == 1


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (1, {"first": 0}),
        (2, {"first": 0, "last": 1}),
        (3, {"first": 0, "middle": 1, "last": 2}),
        (8, {"first": 0, "quarter": 2, "middle": 4, "three quarters": 5, "last": 7}),
    ],
)
def test_places(images: int, expected: dict[str, int]) -> None:
    assert places(images) == expected


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("Image 3.", 3), ("the third image", 3), ("3", 3), ("image 1 and image 2", 0),
        ("none", 0), ("The second one, image 2", 2), ("12", 12),
    ],
)  # fmt: skip
def test_numbers_in_answers(answer: str, number: int) -> None:
    assert haystack.image_number(answer) == number


def test_images_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thing that is asked about is in the file, in its colour; the blind form is grey."""
    monkeypatch.setattr(haystack, "SIZE", 96)
    task = Haystack(images=2, questions=2)
    for example in task.examples:
        if kind(example) == "addressed":
            parts = example.ask(tmp_path)[0]["content"][:-1]
            images = [Image.open(part["path"]).convert("RGB") for part in parts]
            if place(example) < 0:
                assert all(image.getcolors() == [(96 * 96, haystack.GREY)] for image in images)
            else:
                colours = {c for _, c in images[place(example)].getcolors(96 * 96) or []}
                assert COLOURS[example.truth] in colours


@pytest.mark.parametrize(
    "options", [{"images": "1,x"}, {"images": "0"}, {"images": "999"}, {"questions": 0}]
)
def test_options_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Haystack(**options)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    done = llava(
        "eval", "haystack", "--task-option", "images=1,3", "--task-option", "questions=2",
        "-o", tmp_path, "--html", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    means = {mean["name"]: mean for mean in json.loads(done.out)["haystack"]["means"]}
    assert {"1 image", "3 images", "needle first", "3 images: order agreement"} <= means.keys()
    page = (tmp_path / "haystack.html").read_text()
    assert "quarter" not in page and page.count("<td style=") == 4
    wrong = llava("eval", "haystack", "--task-option", "pictures=3")
    assert wrong.code == 2 and "its options: images, questions, seed" in wrong.err


def test_the_report_has_a_grid(task: Haystack, tmp_path: Path) -> None:
    with Journal(tmp_path / "rows.jsonl", {}) as journal:
        few = task.but(examples=task.examples[:40])
        rows = run.run(few, lambda batch: ["yes" for _ in batch], journal)
    report.write(tmp_path / "r.html", few, rows, stats.summary(few, rows), {})
    page = (tmp_path / "r.html").read_text()
    assert "Accuracy by number of images and place" in page and "<th>first" in page


def replies(task: Haystack, reply: Callable[[Example], Reply], folder: Path) -> list[JsonRow]:
    waiting = iter(task.examples)
    with Journal(folder / "rows.jsonl", {}) as journal:
        return run.run(task, lambda batch: [reply(next(waiting)) for _ in batch], journal)


def test_calibration_of_known_answerers(tmp_path: Path) -> None:
    """Always "yes" at 0.9, where half are so: the error is 0.4 and the Brier score 0.41. The blind
    form does not count.
    """
    task = Haystack(images=4, questions=8)
    few = task.but(examples=[e for e in task.examples if kind(e) == "exists"])
    rows = replies(few, lambda _: Reply("Yes", math.log(0.6), 0.9), tmp_path)  # type: ignore[arg-type]
    found = {mean.name: mean for mean in stats.summary(few, rows)}
    assert found["P(yes): expected calibration error"].mean == pytest.approx(0.4)
    assert found["P(yes): Brier score"].mean == pytest.approx(0.41)
    assert found["P(answer): expected calibration error"].mean == pytest.approx(0.1)
    assert found["P(yes): Brier score"].examples == len([e for e in few.examples if place(e) >= 0])


def test_a_coin_that_knows_its_bias_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.random(20_000)
    outcomes = (rng.random(20_000) < probabilities).astype(float)
    one = Calibration("coin", probabilities, outcomes)
    assert len(one.bins) == 10 and one.expected_error < 0.02
    assert sum(b.examples * b.share for b in one.bins) == pytest.approx(outcomes.sum())
    # the mean over p of p (1 - p), and of 1 - p: the most probable tenth is wrong in 5 %
    assert one.brier == pytest.approx(1 / 6, abs=0.01)
    risks = dict(one.risks)
    assert risks[0.1] == pytest.approx(0.05, abs=0.02) and risks[1.0] == 1 - outcomes.mean()


def test_equal_probabilities_are_one_point_of_the_curve() -> None:
    one = Calibration("x", np.array([0.5, 1.0, 0.5, 0.5]), np.array([0.0, 1.0, 1.0, 1.0]))
    assert one.risks == [(0.25, 0.0), (1.0, 0.25)]
    assert [b.examples for b in one.bins] == [3, 1]


@pytest.mark.slow
def test_a_server_is_measured_as_the_library(tmp_path: Path) -> None:
    """Our own server as the URL: answers, probabilities and the report's calibration."""
    words = ("eval", "haystack", "--task-option", "images=2", "--task-option", "questions=1")
    with listening(BUILTIN) as server:
        url = f"{server.address}/v1"
        there = llava(*words, "--url", url, "-o", tmp_path / "url", "--html")
    local = llava(*words, "-o", tmp_path / "here")
    assert (there.code, local.code) == (0, 0), there.err + local.err
    rows = [
        [json.loads(line) for line in (tmp_path / name / "haystack.jsonl").open()][1:]
        for name in ("url", "here")
    ]
    assert len(rows[0]) == len(rows[1]) == 12
    for row, other in zip(*rows, strict=True):
        assert (row["id"], row["answer"], row["score"]) == tuple(
            other[name] for name in ("id", "answer", "score")
        )
        assert row["logprob"] == pytest.approx(other["logprob"], abs=1e-3)
        assert row.get("yes") == pytest.approx(other.get("yes"), abs=1e-3)
    assert "Reliability of P(yes)" in (tmp_path / "url" / "haystack.html").read_text()


def test_a_server_without_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that rejects the field is asked without it, once; one that ignores it is as good."""
    sent: list[bool] = []

    def request(*given: Any) -> dict[str, Any]:
        body = given[2]
        sent.append("logprobs" in body)
        if "logprobs" in body:
            raise remote.SampleRejected("status 400: no logprobs")
        return {"choices": [{"message": {"content": "yes"}}]}

    monkeypatch.setattr(remote, "request", request)
    monkeypatch.setattr(remote, "CONCURRENCY", 1)
    ask = remote.answerer("http://x/v1", "m", None, logprobs=True)
    question = [{"role": "user", "content": "?"}]
    with pytest.warns(UserWarning, match="no calibration"):
        assert ask([question, question]) == [Reply("yes"), Reply("yes")]
    assert sent == [True, False, False]
