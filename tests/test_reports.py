"""HTML reports: every text is escaped, every file is whole and needs nothing else."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from llava_interleave import reports
from llava_interleave.errors import DataError
from llava_interleave.evals import report, stats
from llava_interleave.evals.run import about
from llava_interleave.evals.task import Example, Task

HOSTILE = "<script>alert(1)</script>\"' onload=x <b>&amp;</b> \udcff"


SHOWN = {"class", "type", "id", "for", "alt", "src", "tabindex"}


class Attributes(HTMLParser):
    """The names of all attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {name for name, _ in attrs}


def test_every_text_is_escaped(tmp_path: Path) -> None:
    image = tmp_path / "<b>.png"
    Image.new("RGB", (8, 8)).save(image)
    views = {"type": "views", "views": {HOSTILE: str(image)}}
    example = Example(
        id=HOSTILE,
        group=HOSTILE,
        kind=HOSTILE,
        ask=lambda _: [{"role": "user", "content": [views]}],
        question=HOSTILE,
        truth=HOSTILE,
        scorer=lambda _: 0.0,
    )
    task = Task(
        name=HOSTILE,
        examples=[example],
        max_new_tokens=1,
        paper={HOSTILE: {HOSTILE: 1.0}},
        pipeline=HOSTILE,
        faults=[HOSTILE],
        data=HOSTILE,
    )
    names = ("id", "group", "kind", "question", "truth")
    row: dict[str, object] = dict.fromkeys(names, HOSTILE) | {
        "answer": HOSTILE,
        "score": 0.0,
        "error": None,
    }
    path = tmp_path / "out" / "page.html"
    for error in (None, HOSTILE):
        rows = [row | {"error": error}]
        settings = {"model": HOSTILE, "sampling": {HOSTILE: HOSTILE}}
        report.write(path, task, rows, stats.summary(task, rows), about(task, settings))
        page = path.read_text("utf-8")
        assert "<script" not in page and "<b>" not in page and "&lt;script&gt;" in page
        assert "\\udcff" in page and "&lt;t" not in page
        attributes = Attributes()
        attributes.feed(page)
        assert attributes.found == {"lang", "charset", "name", "content", "http-equiv"} | SHOWN
        assert not re.search(r"https?://|<link|url\(|@import|src=\"(?!data:)", page)
        assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_made_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "old.html").write_text("old")
    with pytest.raises(Exception, match="undefined"):
        reports.write(tmp_path / "old.html", "evals.html", title="x")
    assert [file.name for file in tmp_path.iterdir()] == ["old.html"]
    assert (tmp_path / "old.html").read_text() == "old"
    with pytest.raises(DataError, match=r"cannot write .*there: "):
        reports.write(tmp_path / "not" / "there", "attribution.html", title="x")
