"""Tables and folders as people have them: every file is a row, or an exception with its name."""

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llava_interleave.batch import Source
from llava_interleave.cli import app
from llava_interleave.errors import DataError
from llava_interleave.processing.formats import is_frame_sequence
from llava_interleave.testing import tiny_checkpoint
from tests.helpers.batches import shard
from tests.helpers.benchmarks import save_image


def files_of(source: Source, index: int = 0) -> list[str]:
    """The names of the files in a sample's message."""
    sample = source.sample(index)
    assert sample.error is None, sample.error
    parts = sample.messages[0]["content"]
    return [Path(part["path"]).name for part in parts if part["type"] == "media"]


TABLES = {
    "semicolons": "question;image\nWhat, then?;a.png\n",
    "tabs": "question\timage\nWhat, then?\ta.png\n",
    "bars": "question|image\nWhat, then?|a.png\n",
    "Excel's separator": "sep=;\nquestion;image\nWhat, then?;a.png\n",
    "capital headers": 'Question,IMAGE\n"What, then?",a.png\n',
    "spaces in headers": ' Question , Image Path \n"What, then?", a.png\n',
    "a byte order mark": '\ufeffquestion,image\n"What, then?",a.png\n',
    "commas in a quoted header": '"question";"image";"a, b, c, d"\nWhat, then?;a.png;x\n',
    "lines in a cell": '"question","image","note"\n"What, then?",a.png,"one\n\ntwo"\n',
    "file_name": 'file_name,question\na.png,"What, then?"\n',
    "filename": 'filename,question\na.png,"What, then?"\n',
    "path": 'path,question\na.png,"What, then?"\n',
    "filepath": 'id,filepath,question\n1,a.png,"What, then?"\n',
    "file": 'file,question\na.png,"What, then?"\n',
    "picture": 'picture,question\na.png,"What, then?"\n',
    "photo": 'photo,prompt\na.png,"What, then?"\n',
    "img_path": 'img_path,question\na.png,"What, then?"\n',
    "left_file_name": 'left_file_name,question\na.png,"What, then?"\n',
    "image and its path": 'image,image_path,image_id,question\na.png,/x/a.png,7,"What, then?"\n',
    "image and file_name": 'image,file_name,question\na.png,a.png,"What, then?"\n',
}


@pytest.mark.parametrize("text", TABLES.values(), ids=list(TABLES))
def test_tables_with_one_image(text: str, tmp_path: Path) -> None:
    for suffix in (".csv", ".tsv", ".CSV"):
        (tmp_path / f"in{suffix}").write_text(text, "utf-8", newline="")
        source = Source(tmp_path / f"in{suffix}")
        assert (len(source), files_of(source)) == (1, ["a.png"])
        assert source.sample(0).messages[0]["content"][-1]["text"] == "What, then?"


def test_a_table_in_utf16(tmp_path: Path) -> None:
    """As Excel's "Unicode text" is."""
    (tmp_path / "in.csv").write_text("Frage\tquestion\timage\nx\tÄpfel?\ta.png\n", "utf-16")
    assert files_of(Source(tmp_path / "in.csv")) == ["a.png"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_file_in_a_field_of_another_name_is_not_passed_over(suffix: str, tmp_path: Path) -> None:
    row = {"question": "What?", "subject": "holiday/IMG_1.HEIC", "width": "3"}
    out = StringIO()
    csv.writer(out).writerows([list(row), list(row.values())])
    path = tmp_path / f"in{suffix}"
    path.write_text(out.getvalue() if suffix == ".csv" else json.dumps(row))
    error = str(Source(path).sample(0).error)
    assert "subject holds the file 'holiday/IMG_1.HEIC'" in error and "rename it" in error
    path.write_text(json.dumps({"Image": "a.png", "image": "b.png", "question": "?"}))
    if suffix == ".jsonl":
        assert "two fields are named 'image'" in str(Source(path).sample(0).error)


def test_every_file_of_a_folder_is_a_row_or_an_exception(tmp_path: Path) -> None:
    folder = tmp_path / "album"
    rows = [
        *("1.heic", "2.HEIF", "3.avif", "4.TIFF", "5.tif", "6.mpg", "7.3gp", "8.MTS", "9.wmv"),
        *("10.jxl", "11.svg", "12.jp2", "13.gif", "14.mpeg", "15.flv", "16.PNG"),
    ]
    folder.mkdir()
    for name in rows:
        (folder / name).write_bytes(b"?")
    save_image(tmp_path / "x.png")
    (tmp_path / "x.png").rename(folder / "no suffix")
    save_image(folder / "trip/IMG_1.JPG")
    save_image(folder / "trip/IMG_2.JPG")
    hidden = ["._IMG_1.JPG", ".DS_Store", "trip/._IMG_1.JPG"]
    others = ["notes.txt", "Thumbs.db", "trip/list.txt"]
    for name in (*hidden, *others, "trip/deep/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"text")
    (folder / "empty").mkdir()
    source = Source(folder, "What?")
    samples = [source.sample(i) for i in range(len(source))]
    assert {sample.id for sample in samples} == {*rows, "no suffix", "trip"}
    assert all(sample.error is None for sample in samples)
    assert files_of(source, [s.id for s in samples].index("trip")) == ["IMG_1.JPG", "IMG_2.JPG"]
    reasons = dict(source.skipped)
    assert reasons.keys() == {*hidden, *others, "trip/deep/", "empty/"}
    assert {reasons[name] for name in hidden} == {"hidden"}
    assert {reasons[name] for name in others} == {"not an image or a video"}
    assert len(source.skipped) == len(reasons)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", '{"file_name": "2.png", "question": "Who?", "id": 7}\n'
         '{"file_name": "set/1.png", "text": "-"}\n'),
        ("metadata.csv", "File_Name;Question;ID\n2.png;Who?;7\nset/1.png;;\n"),
    ],
)  # fmt: skip
def test_metadata_of_a_folder(name: str, text: str, tmp_path: Path) -> None:
    for file in ("1.png", "2.png", "set/1.png", "set/2.png"):
        save_image(tmp_path / "in" / file)
    (tmp_path / "in" / name).write_text(text)
    source = Source(tmp_path / "in", "What?")
    samples = [source.sample(i) for i in range(len(source))]
    assert [sample.id for sample in samples] == ["7", "set/1.png", "1.png", "set/2.png"]
    assert [sample.messages[0]["content"][-1]["text"] for sample in samples] == [
        "Who?", "What?", "What?", "What?",
    ]  # fmt: skip
    assert [files_of(source, i) for i in range(4)] == [["2.png"], ["1.png"], ["1.png"], ["2.png"]]
    (tmp_path / "in" / name).write_text("question\nWho?\n" if "csv" in name else '{"a": 1}\n')
    with pytest.raises(DataError, match=r"row 1 of .* names no file"):
        Source(tmp_path / "in")


def test_members_of_shards_that_are_not_read_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    members = [(f"{i}.{end}", b"?") for i in range(3) for end in ("heic", "txt", "cls")]
    shard(folder / "a.tar", *members, ("readme", b"-"))
    (folder / "index.txt").write_text("-")
    source = Source(folder, "What?")
    assert len(source) == 3
    assert all(source.sample(i).messages[0]["content"][0]["type"] == "image" for i in range(3))
    assert source.skipped == [
        ("index.txt", "next to .tar shards only these are read"),
        ("*.txt", "not an image, a video or a .json, 3 members"),
        ("*.cls", "not an image, a video or a .json, 3 members"),
        ("readme", "a name without a key and a suffix"),
    ]


@pytest.mark.parametrize(
    ("names", "frames"),
    [
        (["00001.jpg", "00002.jpg", "00003.jpg"], True),
        (["frame_1.png", "frame_2.png", "frame_10.png", "frame_3.png"], False),
        (["frame_8.png", "frame_9.png", "frame_10.png"], True),
        (["Frame-000.jpg", "Frame-030.jpg", "Frame-060.jpg"], True),
        (["out001.png", "out002.png"], True),
        (["IMG_0001.JPG", "IMG_0002.JPG", "IMG_0003.JPG"], False),
        (["DSC00001.JPG", "DSC00002.JPG"], False),
        (["2.png", "10.png"], False),
        (["1.png"], False),
        (["a.png", "b.png"], False),
        (["1.png", "2.png", "cover.png"], False),
        (["20240101.jpg", "20240317.jpg", "20240318.jpg"], False),
    ],
)
def test_names_that_number_frames(names: list[str], frames: bool) -> None:
    assert is_frame_sequence(names) == frames


def test_the_command_names_what_it_leaves_out_and_fails_with_failed_rows(tmp_path: Path) -> None:
    tiny, folder = tiny_checkpoint(tmp_path / "tiny"), tmp_path / "in"
    save_image(folder / "a.png")
    (folder / "._a.png").write_bytes(b"-")
    words = ["batch", str(folder), "-m", str(tiny), "--question", "What?", "--max-new-tokens", "2"]

    def run(out: str) -> Any:
        return CliRunner().invoke(app, [words[0], words[1], str(tmp_path / out), *words[2:]])

    good = run("good.jsonl")
    assert good.exit_code == 0, good.output
    assert "1 samples, 0 with an error" in good.stderr and "._a.png: hidden" in good.stderr
    for i in range(12):
        (folder / f"{i}.heic").write_bytes(b"no image")
        (folder / f"{i}.txt").write_bytes(b"-")
    bad = run("bad.jsonl")
    assert bad.exit_code == 1, bad.output
    assert "13 samples, 12 with an error" in bad.stderr
    assert "  0.heic: " in bad.stderr and "and 2 more; each line has its error" in bad.stderr
    assert "13 files are not samples" in bad.stderr and "and 3 more, see" in bad.stderr
    assert (tmp_path / "bad.skipped.txt").read_text().count("\n") == 13
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 13
