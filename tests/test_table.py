"""Tables: the same questions about each of many images, typed answers with probabilities."""

import csv
import json
import math
import os
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from pyarrow import parquet
from pydantic import BaseModel, Field

from llava_interleave import Chatbot, load
from llava_interleave.chat import table
from llava_interleave.chat.columns import Column, read_columns
from llava_interleave.chat.detokenize import Answer, TokenLogprob
from llava_interleave.chat.table import (
    Alternatives,
    Cell,
    TableRun,
    probability_of_yes,
    read_cell,
    read_reasoned,
    yes_or_no,
)
from llava_interleave.cli.local_model import LazyModel
from llava_interleave.engine import Timings, Usage
from llava_interleave.engine.sampler import Sampler
from llava_interleave.errors import MediaError, OptionError
from llava_interleave.options import SamplingParams
from recipes.tiny_world.data import render
from recipes.tiny_world.episodes import NORMAL, episode
from tests.helpers.benchmarks import kill_and_resume
from tests.helpers.cli import llava
from tests.helpers.images import random_image

DEMO = Path(__file__).parent.parent / "llava_interleave" / "demo_files"
IMAGES = [DEMO / f"{name}.png" for name in ("album-1", "album-2", "album-3", "shapes", "front")]
COLUMNS: dict[str, Any] = {
    "count": ("How many things are there?", int),
    "star": ("Is there a star?", bool),
    "side": ("Which side is the star on?", Literal["left", "right", "left side"]),
    "what": "What do you see?",
}


@pytest.fixture(scope="module")
def bot() -> Chatbot:
    return load()


def test_a_table_of_the_demo(bot: Chatbot) -> None:
    rows = list(bot.each(IMAGES, COLUMNS))
    assert [row.source for row in rows] == IMAGES
    assert [row["count"].value for row in rows] == [1, 3, 4, 4, 2]
    # without its colour, the star of album-2 is missed
    assert [rows[n]["star"].value for n in (0, 2, 3, 4)] == [False, True, True, False]
    assert "things. top right: large green cross." in rows[2]["what"].value
    assert all(row["count"].probability > 0.95 and row["count"].allowed > 0.99 for row in rows[:4])
    # shapes the model was not asked about in these words: it wanted to write something else
    assert all(row["side"].allowed < 0.5 for row in rows)


@pytest.mark.slow
def test_cells_do_not_depend_on_each_other(bot: Chatbot) -> None:
    """Each cell is that of a table of one image and one column; text is `ask`'s."""
    rows = list(bot.each([*IMAGES, *IMAGES], COLUMNS))  # more than one window
    for source, row in zip([*IMAGES, *IMAGES], rows, strict=True):
        for name, column in COLUMNS.items():
            (alone,) = bot.each([source], {name: column})
            assert row[name].value == alone[name].value
            assert row[name].probability == pytest.approx(alone[name].probability, abs=1e-4)
            assert row[name].allowed == pytest.approx(alone[name].allowed, abs=1e-4)
        assert row["what"].value == str(bot.ask("What do you see?", [source]))


def test_images_that_fail_have_their_error_in_their_row(bot: Chatbot, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n no more")
    rows = list(bot.each([IMAGES[0], broken, tmp_path / "none.png", IMAGES[1]], COLUMNS))
    assert [row["count"].value for row in rows] == [1, None, None, 3]
    assert "broken.png" in rows[1]["count"].error and rows[1]["star"].error
    assert "No such file" in rows[2]["what"].error


def test_answers_that_do_not_end_are_errors(bot: Chatbot) -> None:
    """A text that max_new_tokens would cut is never a value."""
    (row,) = bot.each([IMAGES[2]], {"what": "What do you see?"}, max_new_tokens=3)
    assert row["what"].value is None
    assert "longer than max_new_tokens (3)" in row["what"].error


def test_values_behind_their_reasons(bot: Chatbot) -> None:
    """The model writes "top left and bottom right, above: no" and "top left, middle right: 2"."""
    values: list[object] = []
    kind: type
    for number in range(8):
        shown = episode("single", Random(f"reasons {number}"), NORMAL)
        images = render(shown, 256)
        for question in shown.questions:
            if question.about == "relation":
                text, kind = f"Is the {question.a} {question.relation} the {question.b}?", bool
            elif question.about == "count_colour":
                text, kind = f"How many {question.colour} things are there?", int
            else:
                continue
            (row,) = bot.each(images, {"value": (text, kind)})
            cell, end = row["value"], bot.ask(text, images).text.rpartition(" ")[2]
            assert cell.value == (end == "yes" if kind is bool else int(end))
            assert min(cell.probability, cell.allowed) > 0.9
            values.append(cell.value)
    assert len(values) == 13 and {True, False, 2} <= set(values)


def test_free_answers_that_end_in_no_value(bot: Chatbot) -> None:
    tokenizer = bot.processor.tokenizer
    column = Column("n", "?", int)
    for text, value in (("top left: 12.", 12), ("12 things", None), ("in2", None), ("-3", -3)):
        ids = tokenizer.encode(text, special=False)
        written = [TokenLogprob(one, "", math.log(0.9), ()) for one in ids]
        cell = read_reasoned(column, answer(*written, text=text), tokenizer)
        assert (cell and cell.value) == value
        assert cell is None or cell.probability <= 0.9 + 1e-9
        cut = answer(*written, text=text, reason="length")
        assert read_reasoned(column, cut, tokenizer) is None
    one_of = Column("c", "?", str, ("red", "dark red"))
    ids = tokenizer.encode("left: dark red", special=False)
    written = [TokenLogprob(one, "", 0.0, ()) for one in ids]
    cell = read_reasoned(one_of, answer(*written, text="left: dark red"), tokenizer)
    assert cell == Cell("dark red", 1.0, 1.0)
    assert read_reasoned(one_of, answer(*written, text="left is dark red"), tokenizer) is None


def test_find_ranks_by_the_probability_of_yes(bot: Chatbot) -> None:
    hits = bot.find("Is there a star?", IMAGES)
    rows = {row.source: row["q"] for row in bot.each(IMAGES, {"q": ("Is there a star?", bool)})}
    assert [hit.probability for hit in hits] == sorted(
        (hit.probability for hit in hits), reverse=True
    )
    for hit in hits:
        cell = rows[hit.source]
        yes = cell.probability if cell.value else 1 - cell.probability
        assert hit.probability == pytest.approx(yes, abs=1e-4)


def test_a_folder_is_its_files(bot: Chatbot, tmp_path: Path) -> None:
    """Numbered photos are rows of their own: a camera numbers photos as a video's frames."""
    for number in (10, 9, 1):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"IMG_{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.warns(UserWarning, match="notes.txt"):
        rows = list(bot.each(tmp_path, {"n": ("How many things are there?", int)}))
    assert [Path(str(row.source)).name for row in rows] == ["IMG_1.png", "IMG_9.png", "IMG_10.png"]
    with pytest.raises(MediaError, match="is not a folder"):
        bot.each(tmp_path / "IMG_1.png", {"n": "How many?"})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "columns with different names"),
        ({"a": ""}, "question is a non-empty text"),
        ({"a": ("q", list)}, "the types are str, int"),
        ({"a": ("q", list[int])}, "the types are str, int"),
        ({"a": ("q", int, 3)}, "a question or a pair"),
        ({"a": ("q", Literal[1, 2])}, "different, non-empty"),
        ([Column("a", "q"), Column("a", "r")], "columns with different names"),
        (int, "is not a pydantic model"),
    ],
)
def test_columns_that_are_refused(columns: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_columns(columns)


def test_columns_of_a_pydantic_model() -> None:
    class Photo(BaseModel):
        people: int = Field(description="How many people are there?")
        place: Literal["indoors", "outdoors"] = Field(description="Where was it taken?")

    assert read_columns(Photo) == (
        Column("people", "How many people are there?", int),
        Column("place", "Where was it taken?", str, ("indoors", "outdoors")),
    )


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("what: What is it?", Column("what", "What is it?")),
        ("n int: How many: one or two?", Column("n", "How many: one or two?", int)),
        (
            "where in the house|out : Where?",
            Column("where", "Where?", str, ("in the house", "out")),
        ),
    ],
)
def test_columns_of_the_command_line(text: str, column: Column) -> None:
    assert Column.from_text(text) == column


@pytest.mark.parametrize("text", ["what", "what:", ": Why?", "n whole: How many?", "n a|: Which?"])
def test_columns_of_the_command_line_that_are_refused(text: str) -> None:
    with pytest.raises(OptionError):
        Column.from_text(text)


@pytest.mark.parametrize(
    "changes", [{"n": 2}, {"temperature": 0.5}, {"stop": "a"}, {"logprobs": 1}]
)
def test_options_that_a_table_refuses(bot: Chatbot, changes: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="greedy, one per cell"):
        bot.each(IMAGES, COLUMNS, **changes)


class Allow:
    """A constraint that allows the same tokens at each step."""

    def __init__(self, size: int, tokens: list[int]) -> None:
        self.mask = torch.zeros(size, dtype=torch.bool)
        self.mask[tokens] = True

    def allowed(self) -> torch.Tensor:
        return self.mask

    def take(self, token: int) -> None: ...


def test_the_probability_of_all_allowed_tokens() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    constraint = Allow(50, [3, 7, 8])
    sampler = Sampler(SamplingParams(logprobs=0), [], 50, torch.device("cpu"), constraint)
    pick = sampler.pick(logits)
    probabilities = logits.double().softmax(-1)
    assert math.exp(pick.allowed_logprob) == pytest.approx(float(probabilities[[3, 7, 8]].sum()))
    free = Sampler(SamplingParams(logprobs=0), [], 50, torch.device("cpu")).pick(logits)
    assert free.allowed_logprob == 0.0


def answer(*tokens: TokenLogprob, text: str = "4", reason: str = "stop") -> Answer:
    ids = tuple(token.token for token in tokens)
    times = Timings(0.0, 0.0, 0.0, 0.0, 0.0, None)
    return Answer(text, ids, reason, Usage(1, 0, len(ids), 0, 0), times, tokens)


def test_a_cell_is_the_product_over_its_tokens(bot: Chatbot) -> None:
    """probability: p / p(allowed) of each token. allowed: p(allowed), without the token that ends
    the answer.
    """
    tokens = [(0.4, 0.8), (0.3, 0.6), (0.1, 0.2)]
    written = [TokenLogprob(1, "x", math.log(p), (), math.log(a)) for p, a in tokens]
    cell = read_cell(Column("n", "?", int), answer(*written, text="42"), bot.processor.tokenizer)
    assert (cell.value, cell.error) == (42, "")
    assert cell.probability == pytest.approx(0.125)
    assert cell.allowed == pytest.approx(0.48)


def test_yes_and_no_in_either_case(bot: Chatbot) -> None:
    tokenizer = bot.processor.tokenizer
    (yes,), (no,) = (tokenizer.encode(word, special=False) for word in ("yes", "no"))
    other = tokenizer.encode("4", special=False)[0]
    top = ((no, math.log(0.2)), (other, math.log(0.5)), (yes, math.log(0.1)))
    assert yes_or_no(TokenLogprob(no, "no", math.log(0.2), top), tokenizer) == pytest.approx(
        (0.1, 0.2)
    )
    assert yes_or_no(TokenLogprob(no, "no", -1.0, top[1:2]), tokenizer) is None
    first: Alternatives = ("This", [("This", -0.1), ("yes", -5.0)])
    for text, p, expected in (("no", 0.6, 0.25), ("no", 0.2, 1.0), ("not", 0.6, 1.0)):
        then = (" " + text, [(" " + text, math.log(p)), (" Yes", math.log(0.2))])
        assert probability_of_yes([first, then]) == pytest.approx(expected)
    cell = read_cell(
        Column("b", "?", bool),
        answer(TokenLogprob(no, "no", math.log(0.2), top, math.log(0.3)), text="no"),
        tokenizer,
    )
    assert (cell.value, cell.probability) == (False, pytest.approx(2 / 3))
    assert cell.allowed == pytest.approx(0.3)


def test_the_command_resumes_and_adds_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run computes only cells that are new, by the content of the images."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for image in IMAGES[:3]:
        (photos / image.name).write_bytes(image.read_bytes())
    computed: list[str] = []
    column_of = TableRun._column

    def counting(self: TableRun, column: Column, window: Any, cells: Any) -> None:
        before = self.bot.answer_jobs

        def answer_jobs(jobs: list[Any]) -> list[Answer]:
            computed.extend([column.name] * len(jobs))
            return before(jobs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.bot, "answer_jobs", answer_jobs)
            column_of(self, column, window, cells)

    monkeypatch.setattr(TableRun, "_column", counting)
    out = tmp_path / "table.csv"
    count = ("-c", "count int: How many things are there?")
    done = llava("table", photos, *count, "-o", out)
    assert (done.code, computed) == (0, ["count"] * 3), done.err
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["count"] for row in rows] == ["1", "3", "4"]
    (photos / "copy.png").write_bytes(IMAGES[0].read_bytes())
    (photos / "new.png").write_bytes(IMAGES[4].read_bytes())
    computed.clear()
    done = llava("table", photos, *count, "-c", "star bool: Is there a star?", "-o", out)
    assert (done.code, sorted(computed)) == (0, ["count"] + ["star"] * 5), done.err
    with out.open(newline="") as file:
        again = list(csv.DictReader(file))
    assert [row["count"] for row in again] == ["1", "3", "4", "1", "2"]
    other = llava("table", photos, *count, "-o", out, "--preset", "hf")
    assert other.code == 2 and "preset" in other.err  # cells of other options are not used


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need fork")
def test_killed_tables_and_searches_are_those_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any moment and resumed, both end as if nothing had happened, to the last bit where
    results do not depend on the batch."""
    bot = load(batch_invariant=True)
    for number in range(8):
        random_image(40, 40, number).save(tmp_path / f"{number}.png")
    monkeypatch.setattr(LazyModel, "ready", lambda *_: bot)
    monkeypatch.setattr(table, "IMAGES_IN_FLIGHT", 2)
    hits = tmp_path / "hits.json"

    def work() -> None:
        torch.set_num_threads(1)
        column = ("-c", "things int: How many things are there?")
        assert llava("table", tmp_path, *column, "-o", tmp_path / "t.csv").code == 0
        words = ("find", "Is there a star?", tmp_path, "--json", "--cells", tmp_path / "cells")
        hits.write_text(llava(*words).out)

    work()
    files = [tmp_path / name for name in ("t.csv", "t.csv.cells", "cells", "hits.json")]
    expected = [sorted(path.read_text().splitlines()) for path in files]
    for path in files:
        path.unlink()
    assert kill_and_resume(work, Random(2), most=3, longest=0.5) > 1
    assert [sorted(path.read_text().splitlines()) for path in files] == expected


def test_all_formats_have_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("no image")
    words = [IMAGES[0], tmp_path / "none.txt", "-c", "count int: How many things are there?"]
    for suffix in ("csv", "jsonl", "parquet"):
        done = llava("table", *words, "-o", tmp_path / f"t.{suffix}")
        assert done.code == 1 and "1 images with an error" in done.err
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert parquet.read_table(tmp_path / "t.parquet").to_pylist() == lines
    assert lines[0]["count"] == 1 and lines[0]["error"] is None
    assert lines[1]["count"] is None and "none.txt" in lines[1]["error"]
    with (tmp_path / "t.csv").open(newline="") as file:
        for row, line in zip(csv.DictReader(file), lines, strict=True):
            assert {key: value or None for key, value in row.items()} == {
                key: None if value is None else str(value) for key, value in line.items()
            }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.png", "-c", "n: ?", "-o", "t.txt"], "the table ends in"),
        (["x.png", "-c", "n", "-o", "t.csv"], "a column is"),
        (["x.png", "-c", "file: ?", "-o", "t.csv"], "two columns file"),
        (["x.png", "-c", "n: ?", "-c", "n_allowed: ?", "-o", "t.csv"], "two columns n_allowed"),
        (["http://localhost/a.png", "-c", "n: ?", "-o", "t.csv"], "reads files and folders"),
        (["*.nothing", "-c", "n: ?", "-o", "t.csv"], "no file matches"),
    ],
)
def test_commands_that_are_refused(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = llava("table", *words)
    assert done.code == 2 and message in done.err
    assert not list(tmp_path.glob("t.*"))


def test_a_file_of_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    out.write_text("mine")
    done = llava("table", IMAGES[0], "-c", "n: How many?", "-o", out)
    assert done.code == 2 and "already exists" in done.err
    assert out.read_text() == "mine"


def test_find_prints_and_reports(tmp_path: Path) -> None:
    strange = tmp_path / "a<b>&.png"
    strange.write_bytes(IMAGES[2].read_bytes())
    html = tmp_path / "hits.html"
    done = llava("find", "Is there a star?", strange, IMAGES[0], "--html", html)
    assert done.code == 0, done.err
    assert [line.split()[-1] for line in done.out.splitlines()] == [str(strange), str(IMAGES[0])]
    assert "1 of 2 images are more likely yes than no" in done.err
    page = html.read_text()
    assert "a&lt;b&gt;&amp;.png" in page and "a<b>" not in page
    as_json = json.loads(llava("find", strange, "Is there a star?", "--json").out)
    assert as_json["hits"][0]["source"] == str(strange)
    assert llava("find", "Is there a star?").code == 2


def test_a_prompt_that_the_kv_cache_cannot_hold_is_an_error_of_its_cell(bot: Chatbot) -> None:
    small = load(kv_bytes=160 * bot.engine.bytes_per_token)
    columns = {
        "n": ("How many things are there?", int),
        "long": "How many things are there? " * 60,
    }
    rows = list(small.each(IMAGES[:3], columns, max_new_tokens=16))
    assert [row["n"].value for row in rows] == [1, 3, 4]
    assert all("KV" in row["long"].error for row in rows)
