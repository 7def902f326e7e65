"""Benchmarks: reading the published forms, running, resuming after kills, means, comparison and
report. No model is needed.
"""

import json
import os
import random
import re
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_interleave.chat import BUILTIN
from llava_interleave.cli import evaluate
from llava_interleave.errors import DataError, LlavaError, PromptError
from llava_interleave.evals import interleave, multiple_choice, published, report, stats
from llava_interleave.evals.run import PREVIOUS_TURN_FAILED, about, run
from llava_interleave.evals.task import Example, Messages, Task
from llava_interleave.journal import Journal, JsonRow, read
from llava_interleave.processing.chat_template import MediaPlaceholder, parse
from llava_interleave.processing.loader import Loader
from llava_interleave.processing.tokenizer import Tokenizer
from llava_interleave.processing.video import FrameSampling
from recipes.tiny_world import benchmark
from recipes.tiny_world.data import exam, render
from recipes.tiny_world.episodes import FRAMES, LEVELS
from tests.helpers.benchmarks import (
    BROKEN,
    WHOLE,
    bench,
    kill_and_resume,
    made,
    parquet,
    said,
    sample,
)

ANSWERS = {
    "Which of <image> and <image>?": "A.",
    "<image><image>What differs?": "a blue car is gone",
    "<image> and <image>": "nothing",
    "<image>?": "B",
    "And <image>?": "Answer: B",
    "Sure?": "yes",
    "<image>": "a cube",
}


def rows_of(task: Task, answer: Any, folder: Path, **more: Any) -> list[JsonRow]:
    with Journal(folder / "rows.jsonl", about(task, {})) as journal:
        return run(task, answer, journal, **more)


def test_interleave_bench(tmp_path: Path) -> None:
    """Prompts are the human turns with images in place; a later turn has the answers before it,
    and its own images.
    """
    task = interleave.load("interleave-in", bench(tmp_path, WHOLE))
    assert not task.faults
    assert [e.id for e in task.examples] == [
        "RAVEN/1/1",
        "Spot-the-Diff/1/1",
        "Spot-the-Diff/2/1",
        "RAVEN/2/1",
        "RAVEN/2/2",
        "RAVEN/2/3",
        "CLEVR-Change/1/1",
    ]
    answer = said(ANSWERS)
    rows = rows_of(task, answer, tmp_path, batch_size=2)
    last = next(messages for messages in answer.received if len(messages) == 5)
    assert [m["role"] for m in last] == ["user", "assistant", "user", "assistant", "user"]
    assert [m["content"] for m in last if m["role"] == "assistant"] == ["B", "Answer: B"]
    assert last[2]["content"][1] == {
        "type": "image",
        "path": str(tmp_path / "interleave/Split1/RAVEN/2-1.png"),
    }
    assert {row["id"]: row["score"] for row in rows if row["group"] == "RAVEN"} == {
        "RAVEN/1/1": 1,
        "RAVEN/2/1": 0,
        "RAVEN/2/2": 1,
        "RAVEN/2/3": 0,
    }
    lines = {line.name: line for line in stats.summary(task, rows)}
    open_scores = [row["score"] for row in rows if row["group"] == "Spot-the-Diff"]
    assert open_scores[0] == 2 * ((4 / 5 * (4 / 5)) / (4 / 5 + 4 / 5 + 1e-8))
    assert lines["Spot-the-Diff"].mean == np.mean(open_scores)
    assert lines["RAVEN"].mean == lines["puzzle"].mean == 0.5
    assert lines["spot_the_diff"].mean == (np.mean(open_scores) + lines["CLEVR-Change"].mean) / 2
    assert "average" not in lines  # of eight categories six are missing
    assert lines["RAVEN"].low < 0.5 < lines["RAVEN"].high


def test_the_average_is_the_papers(tmp_path: Path) -> None:
    """The mean of its eight categories: 7B has 58.6 in the paper."""
    figures = interleave.PAPER["interleave-in"]["7B"]
    assert sum(figures[name] for name in interleave.AVERAGE) / 8 == pytest.approx(58.6, abs=0.13)
    samples = [
        sample(1, sets[0], "multi-choice", "<image>", "A")
        for sets in interleave.CATEGORIES.values()
    ]
    task = interleave.load("interleave-in", bench(tmp_path, samples))
    line = stats.summary(task, rows_of(task, said({"<image>": "a"}), tmp_path))[-1]
    assert (line.name, line.mean, line.examples) == ("average", 1.0, 8)


def test_as_published_repeats_the_slips(tmp_path: Path) -> None:
    mixed = [*WHOLE, sample(3, "RAVEN", "open-ended", "<image>!", "one two")]
    task = interleave.load("interleave-in", bench(tmp_path, mixed), as_published=True)
    answer = said({**ANSWERS, "<image>!": "two"})
    rows = {row["id"]: row for row in rows_of(task, answer, tmp_path)}
    last = max(answer.received, key=len)
    assert [m["role"] for m in last] == [
        "system",
        "user",
        "assistant",
        "system",
        "user",
        "assistant",
        "system",
        "user",
    ]
    assert (
        rows["RAVEN/3/1"]["score"] == 0
    )  # judged as the first sample of RAVEN is: by the whole text
    own = interleave.load("interleave-in", tmp_path)
    assert next(e for e in own.examples if e.id == "RAVEN/3/1").scorer("two") == pytest.approx(
        2 / 3
    )


def test_broken_samples_are_named_and_the_rest_is_scored(tmp_path: Path) -> None:
    bench(
        tmp_path,
        [
            WHOLE[0],
            *(one for one, _ in BROKEN),
            WHOLE[4],
            sample(8, "VIST", "open-ended", "<image>", "x"),
            WHOLE[2],
        ],
    )
    folder = tmp_path / "interleave/Split1"
    (folder / "VIST/8-0.png").unlink()
    (folder / "Spot-the-Diff/2-1.png").write_bytes(b"no image")
    task = interleave.load("interleave-in", tmp_path)
    assert [e.id for e in task.examples] == ["RAVEN/1/1", "CLEVR-Change/1/1"]
    assert len(task.faults) == len(BROKEN) + 2
    for fault, wanted in zip(
        task.faults,
        [*(w for _, w in BROKEN), "8-0.png does not exist", "2-1.png is not a readable image"],
        strict=True,
    ):
        assert wanted in fault
    assert "number 2" in task.faults[0]


def test_equal_ids_are_told_apart(tmp_path: Path) -> None:
    task = interleave.load("interleave-in", bench(tmp_path, [WHOLE[0], WHOLE[0]]))
    assert [e.id for e in task.examples] == ["RAVEN/1/1", "RAVEN/1#2/1"]


def test_a_missing_file_says_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"multi_view_in_domain\.json.*LLaVA-NeXT-Interleave-Bench.*Split1"
    ):
        interleave.load("interleave-views", tmp_path)
    for name in published.TASKS:
        with pytest.raises(DataError, match=f"{name}.*fetch"):
            published.load(name, tmp_path)


def test_what_cannot_be_answered_scores_nought(tmp_path: Path) -> None:
    """With its reason; a turn after it is not asked at all."""
    task = interleave.load("interleave-in", bench(tmp_path, WHOLE))

    def answer(batch: Sequence[Messages]) -> list[str | LlavaError]:
        return [
            PromptError("too long") if m[-1]["content"][0].get("text") == "And " else "A"
            for m in batch
        ]

    rows = {row["id"]: row for row in rows_of(task, answer, tmp_path)}
    assert (rows["RAVEN/2/2"]["error"], rows["RAVEN/2/2"]["score"]) == ("too long", 0)
    assert rows["RAVEN/2/3"]["error"] == PREVIOUS_TURN_FAILED
    lines = {line.name: line for line in stats.summary(task, list(rows.values()))}
    assert (lines["RAVEN"].failed, lines["RAVEN"].examples, lines["RAVEN"].mean) == (2, 4, 0.25)


def counting(count: int) -> Task:
    """Questions in pairs, of which the second follows the first."""

    def example(i: int) -> Example:
        messages = [{"role": "user", "content": [{"type": "text", "text": f"{i}"}]}]
        follows = str(i - 1) if i % 2 else ""
        return Example(
            id=str(i),
            group="n",
            ask=lambda _: messages,
            question=f"{i}",
            truth=f"{i}",
            scorer=lambda s: float(s == f"{i}"),
            follows=follows,
        )

    return Task(
        name="counting", examples=[example(i) for i in range(count)], max_new_tokens=4, data="x"
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need fork")
def test_killed_runs_lose_and_double_nothing(tmp_path: Path) -> None:
    task = counting(600)

    def work() -> None:
        def answer(batch: Sequence[Messages]) -> list[str]:
            time.sleep(0.004)
            return [messages[-1]["content"][0]["text"] for messages in batch]

        rows_of(task, answer, tmp_path, batch_size=3)

    assert kill_and_resume(work, random.Random(5)) == 20
    _, rows = read(tmp_path / "rows.jsonl")
    assert sorted(int(row["id"]) for row in rows) == list(range(600))
    assert all(row["answer"] == row["truth"] and row["score"] == 1 for row in rows)


@pytest.mark.slow
def test_an_incomplete_line_is_removed_at_every_length(tmp_path: Path) -> None:
    """Wherever a file was cut, what is whole is kept and the rest answered again."""
    task = counting(2)
    answer = said({str(i): str(i) for i in range(2)})
    rows_of(task, answer, tmp_path)
    path = tmp_path / "rows.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        answer.received.clear()
        rows_of(task, answer, tmp_path)
        assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
        assert len(answer.received) == 2 - max(0, whole[:cut].count(b"\n") - 1)


@pytest.mark.parametrize(
    "content", [b"notes of mine", b"notes\n", b'{"run": 3}\n', b'{"id": "1"}\n']
)
def test_another_file_is_not_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="choose another file"):
        Journal(path, {"task": "a"})
    assert path.read_bytes() == content


def test_journals_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Journal(path, {"task": "a", "precision": "float32"}) as first:
        first.add([{"id": "1"}, {"id": "2"}])
        with pytest.raises(DataError, match="another process"):
            Journal(path, {"task": "a", "precision": "float32"})
    with pytest.raises(DataError, match="precision 'float32', not 'bfloat16'"):
        Journal(path, {"task": "a", "precision": "bfloat16"})
    path.write_bytes(path.read_bytes() + b'{"id": "1"}\n')
    with pytest.raises(DataError, match="line 4"):
        Journal(path, {"task": "a", "precision": "float32"})


def test_a_changed_question_is_an_error(tmp_path: Path) -> None:
    rows_of(counting(2), said({}), tmp_path)
    changed = counting(2)
    odd = Example(
        id="1",
        group="n",
        ask=changed.examples[1].ask,
        question="?",
        truth="1",
        scorer=lambda _: 0.0,
    )
    with pytest.raises(DataError, match="another question"):
        rows_of(
            Task(name="counting", examples=[odd], max_new_tokens=4, data="x"), said({}), tmp_path
        )


def test_comparison() -> None:
    """8 better, 2 worse: sign test by hand 2 (1 + 10 + 45) / 1024; the interval has the difference
    in it.
    """
    a = [{"id": str(i), "group": "g", "score": float(i < 4)} for i in range(20)]
    b = [{"id": str(i), "group": "g", "score": float(2 <= i < 12)} for i in range(20)] + [
        {"id": "x", "group": "g", "score": 1.0}
    ]
    (found,) = stats.compare(a, b)
    assert (found.a, found.b, found.pairs, found.better, found.worse) == (0.2, 0.5, 20, 8, 2)
    assert found.p == 2 * 56 / 1024
    assert found.low < 0.3 < found.high
    assert stats.sign_test(0, 0) == stats.sign_test(3, 3) == 1
    with pytest.raises(DataError, match="no example in common"):
        stats.compare(a, [{"id": "y", "group": "g", "score": 1.0}])


@pytest.mark.slow
def test_bootstrap_intervals_hold() -> None:
    """About 95 of 100 intervals of 200 draws at 0.3 have 0.3 in them."""
    inside = 0
    for seed in range(100):
        draws = np.random.default_rng(seed).random(200) < 0.3
        rows = [
            {"id": str(i), "group": "g", "score": float(d), "error": None}
            for i, d in enumerate(draws)
        ]
        (line,) = stats.summary(Task(name="t", examples=[], max_new_tokens=1), rows)
        inside += line.low <= 0.3 <= line.high
    assert 88 <= inside <= 99


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_report_is_one_file_with_everything(tmp_path: Path) -> None:
    bench(
        tmp_path,
        [*WHOLE, sample(9, "RAVEN", "multi-choice", "<b>bold</b> <image>", "A"), BROKEN[2][0]],
    )
    task = interleave.load("interleave-in", tmp_path)
    rows = rows_of(task, said({**ANSWERS, "<b>bold</b> <image>": "<script>x</script>"}), tmp_path)
    report.write(
        tmp_path / "r.html", task, rows, stats.summary(task, rows), about(task, {"model": "m&m"})
    )
    page = (tmp_path / "r.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert sum(tag == "article" for tag, _ in tags.found) == len(rows) == 8
    images = [attributes["src"] or "" for tag, attributes in tags.found if tag == "img"]
    assert len(images) == 10
    assert all(src.startswith("data:image/jpeg;base64,") for src in images)
    assert not [a for _, attributes in tags.found for a in attributes if a.startswith("on")]
    links = {attributes["href"] for tag, attributes in tags.found if tag == "a"}
    first = {row["group"]: f"#{row['id']}" for row in reversed(rows)}
    assert links == set(first.values()) and len(links) > 1  # to places of this page alone
    assert links <= {f"#{attributes.get('id')}" for _, attributes in tags.found}
    assert "script" not in {tag for tag, _ in tags.found}
    assert "b" not in {tag for tag, _ in tags.found}
    for shown in ("m&amp;m", "a blue car is gone", "1 broken samples", "48.7", interleave.PIPELINE):
        assert shown in page
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_world_is_a_task(tmp_path: Path) -> None:
    """The same questions, kinds and score as asking one by one; the report shows videos
    and views.
    """
    truths = {
        exam(s, i, held_out=False)[2]: exam(s, i, held_out=False)[1].answer
        for s in ("views", "video")
        for i in range(3)
    }

    def answer(batch: Sequence[Messages]) -> list[str]:
        return [
            truths[m[-1]["content"][-1]["text"]] if i else "no idea" for i, m in enumerate(batch)
        ]

    score = benchmark.evaluate(answer, "views", 3, held_out=False)
    assert (score.correct, score.count) == (2, 3)
    _, question, text = exam("views", 0, held_out=False)
    assert score.wrong == [(0, text, question.answer, "no idea")]
    assert sum(count for _, count in score.kinds.values()) == 3
    task = benchmark.World(questions=1, scenario="views,video")
    rows = rows_of(task, answer, tmp_path)
    report.write(tmp_path / "w.html", task, rows, stats.summary(task, rows), {})
    views = len(exam("views", 0, held_out=False)[0].names)
    assert (tmp_path / "w.html").read_text().count("<img") == views + report.FRAMES


@pytest.mark.parametrize("level", LEVELS)
def test_a_video_of_the_world_is_looked_at_in_the_frames_that_its_story_tells(
    level: str, tmp_path: Path
) -> None:
    task = benchmark.World(questions=3, scenario="video", level=level)
    assert task.data == f"training wordings, level {level}"
    for number, example in enumerate(task.examples):
        ep, question, text = exam("video", number, held_out=False, level=LEVELS[level])
        assert (example.question, example.truth) == (text, question.answer)
        (message,) = parse(example.ask(tmp_path), FrameSampling(frames=FRAMES))
        slot = message.parts[0]
        assert isinstance(slot, MediaPlaceholder)
        assert slot.sampling
        frames = Loader().video(slot.source, slot.sampling).frames
        for frame, drawn in zip(frames, render(ep, benchmark.SIZE), strict=True):
            assert np.abs(np.asarray(frame, float) - np.asarray(drawn, float)).mean() < 6


@pytest.mark.parametrize("level", LEVELS)
def test_the_longest_answers_of_the_world_have_room(level: str) -> None:
    """In 64 tokens there was none for the order of three events, after what four frames show."""
    tokenizer = Tokenizer.from_folder(BUILTIN)
    counts = [
        exam(s, i, held_out=False, level=LEVELS[level])[1].full_answer
        for s in ("multi", "video")
        for i in range(400)
    ]
    longest = max(counts, key=len)
    assert len(longest) > (100 if level == "easy" else 200)
    assert (
        len(tokenizer.encode(longest))
        < benchmark.World(questions=1, scenario="video", level=level).max_new_tokens
    )


CASES = {
    "nlvr2": (
        2,
        "A",
        "Two dogs.",
        ["nlvr2/images/test1-0-1-img0.png", "nlvr2/images/test1-0-1-img1.png"],
    ),
    "qbench": (1, "B", "A. Blurry\nB. Clear\n", ["qbench/images/00051.jpg"]),
    "nextqa": (1, "C", "play?\nA. roll\nB. tap, feet\n", ["nextqa/NExTVideo/1164/4010069381.mp4"]),
    "pope": (6, "yes", "snowboard", ["pope/val2014/COCO_val2014_000000310196.jpg"]),
    "mvbench": (20, "B", "A. Ran\nB. Sat\nC. Fell\n", ["mvbench/video/star/Charades_v1_480/a.mp4"]),
    "raven": (
        2,
        "D",
        "C. <image>\nD. <image>\n",
        [f"center_single-RAVEN_8_test-{i}.png" for i in range(16)],
    ),
    "scanqa": (
        1,
        "brown cabinet | cabinet",
        "corner?\n",
        [
            f"scanqa/scannet_frames_25k/scene0011_00/color/{i * 40 // 16 * 100:06}.jpg"
            for i in range(16)
        ],
    ),
    "blink": (3, "B", "(B) 2\n(C) 3\nAnswer with", ["val-00000-of-00001-0-0.png"]),
    "muirbench": (
        2,
        "A",
        "A. <image>\nB. None",
        [f"test-00000-of-00002-0-{i}.png" for i in range(3)],
    ),
    "ai2d": (2, "B", "What is E?\nA. a worm\n", ["test-00000-of-00001-2ce340398c113b79-0-0.png"]),
    "docvqa": (1, "8 May 1988 | May 8, 1988", "date?\n", ["validation-00000-of-00001-0-0.png"]),
    "vqav2": (
        1,
        "down | at table | skateboard | the table.",
        "looking?\n",
        ["vqav2/val2014/COCO_val2014_000000262148.jpg"],
    ),
}
"""Of a task: examples, and of the first one the truth, some of the text, and the files."""


@pytest.mark.parametrize("name", published.TASKS)
def test_published_forms(name: str, tmp_path: Path) -> None:
    made(tmp_path, name)
    count, truth, asks, files = CASES[name]
    task = published.load(name, tmp_path)
    assert len(task.examples) == len({e.id for e in task.examples}) == count
    first = task.examples[0]
    (message,) = first.ask(tmp_path)
    media = [part for part in message["content"] if part["type"] != "text"]
    assert [part["path"] for part in media] == [str(tmp_path / file) for file in files]
    text = "".join(part.get("text", "<image>") for part in message["content"])
    assert asks in first.question
    assert text.replace("<image>", "") == first.question.replace("<image>", "")
    assert first.truth == truth
    assert (first.scorer(truth.split(" | ")[0]), first.scorer(""), first.scorer("Q")) == (
        1,
        float(name == "pope"),
        float(name == "pope"),
    )
    assert set(CASES) == set(published.TASKS) == set(evaluate.PUBLISHED)


def test_images_stand_where_the_text_says(tmp_path: Path) -> None:
    """MuirBench's and RAVEN's in place, the right ones; BLINK's before; what a row lacks is left
    out.
    """
    for name in ("muirbench", "raven", "blink"):
        made(tmp_path, name)
    (message,) = published.load("muirbench", tmp_path).examples[1].ask(tmp_path)
    assert [part["type"] for part in message["content"]] == [
        "text",
        "image",
        "text",
        "image",
        "text",
        "image",
        "text",
    ]
    shown = [
        Image.open(part["path"]).getpixel((0, 0))
        for part in message["content"]
        if part["type"] == "image"
    ]
    assert shown == [(255, 0, 0), (0, 0, 255), (0, 128, 0)]
    (message,) = published.load("raven", tmp_path).examples[0].ask(tmp_path)
    panels = [part["path"] for part in message["content"] if part["type"] == "image"]
    assert [Image.open(path).getpixel((5, 5)) for path in panels] == list(range(16))
    assert [
        [part["type"] for part in e.ask(tmp_path)[0]["content"]]
        for e in published.load("blink", tmp_path).examples
    ] == [
        ["image", "text"],
        ["image", "image", "text"],
        ["image", "text"],
    ]


def test_a_missing_part_is_an_error(tmp_path: Path) -> None:
    made(tmp_path, "muirbench")
    (tmp_path / "muirbench/data/test-00001-of-00002.parquet").unlink()
    with pytest.raises(
        DataError, match=r"of the 2 parts of .*test-\*-of-00002.* some are missing: fetch"
    ):
        published.load("muirbench", tmp_path)
    made(tmp_path, "ai2d")
    path = next((tmp_path / "ai2d/data").iterdir())
    parquet(path, [{"question": "?", "options": ["a"], "answer": "0"}])
    assert len(published.load("ai2d", tmp_path).examples) == 1
    parquet(path, [{"question": "?", "options": ["a"]}])
    with pytest.raises(DataError, match="has no column answer; it has question, options"):
        published.load("ai2d", tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        published.load("ai2d", tmp_path)


def test_figures(tmp_path: Path) -> None:
    """POPE by hand: 3 yes of which 2 are right, 3 no of which 2 are right in one split; nothing but
    no in the others.
    """
    made(tmp_path, "pope")
    (row,) = [{"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"}]
    rows = [
        row | {"question_id": i, "text": str(i), "label": "yes" if i < 3 else "no"}
        for i in range(6)
    ]
    (tmp_path / "pope/coco_pope_random.json").write_text("\n".join(map(json.dumps, rows)))
    task = published.load("pope", tmp_path)
    answering = said(
        {
            f"<image>{i}\n{multiple_choice.SHORT_INSTRUCTION}": "Yes" if i in (0, 1, 5) else "No"
            for i in range(6)
        }
    )

    def answer(batch: Sequence[Messages]) -> list[str | LlavaError]:
        return [one or "No" for one in answering(batch)]

    lines = {line.name: line for line in stats.summary(task, rows_of(task, answer, tmp_path))}
    assert task.metrics
    found = {name: lines[f"random: {name}"].mean for name in task.metrics.of}
    assert found == {"precision": 2 / 3, "recall": 2 / 3, "F1": 2 / 3, "share of yes": 0.5}
    assert lines["random"].mean == 4 / 6
    assert lines["popular: precision"].mean == lines["popular: F1"].mean == 0  # no yes at all
    assert (lines["all examples: recall"].mean, lines["all examples: recall"].examples) == (
        2 / 5,
        10,
    )
    assert lines["all examples"].mean == 6 / 10
    assert lines["average"].mean == pytest.approx((4 / 6 + 1 / 2 + 1 / 2) / 3)
    assert lines["random: recall"].low < 2 / 3 < lines["random: recall"].high
    made(tmp_path, "scanqa")
    task = published.load("scanqa", tmp_path)
    lines = {
        line.name: line
        for line in stats.summary(
            task, rows_of(task, lambda _: ["a Cabinet."], tmp_path / "scanqa")
        )
    }
    assert lines["ScanQA"].mean == 0
    assert lines["ScanQA: ROUGE-L"].mean == pytest.approx(2 / 3)


def test_pope_counts_a_no(tmp_path: Path) -> None:
    made(tmp_path, "pope")
    yes, no = published.load("pope", tmp_path).examples[:2]
    assert [
        no.scorer(s) for s in ("No", "There is no dog.", "no, none", "Yes. But not here.", "None")
    ] == [1, 1, 1, 0, 0]
    assert yes.scorer("Yes, it is.") == 1


def test_mvbench_asks_about_a_part(tmp_path: Path) -> None:
    """Seconds 1 to 2 of a video; of frames at three a second, 00003 to 00006."""
    made(tmp_path, "mvbench")
    examples = published.load("mvbench", tmp_path).examples
    parts = {e.group: e.ask(tmp_path)[0]["content"][0] for e in examples}
    assert (parts["action_sequence"]["start"], parts["action_sequence"]["end"]) == (1.0, 2.0)
    assert "start" not in parts["action_antonym"]
    assert [Path(f).name for f in parts["episodic_reasoning"]["video"]] == [
        f"{i:05}.jpg" for i in range(3, 7)
    ]
    frames = Task(
        name="mvbench",
        examples=[e for e in examples if e.group == "episodic_reasoning"],
        max_new_tokens=1,
    )
    report.write(tmp_path / "m.html", frames, rows_of(frames, said({}), tmp_path), [], {})
    assert (tmp_path / "m.html").read_text().count("<img") == 4


def test_another_format_is_an_error(tmp_path: Path) -> None:
    made(tmp_path, "qbench")
    (tmp_path / "qbench/llvisionqa_dev.json").write_text(
        '[{"img_path": "a", "question": "?", "candidates": ["x"], "correct_ans": "y"}]'
    )
    with pytest.raises(DataError, match=re.escape("after 0 samples: not in the published format")):
        published.load("qbench", tmp_path)
