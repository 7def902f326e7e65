"""Many samples from files: every form read, order kept, failures in their place, kills survived."""

import gzip
import json
import os
import random
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from llava_interleave.batch import JsonRow, Reply, ReplyFn, Source, order, run
from llava_interleave.errors import DataError, LlavaError, OptionError, PromptError, Unsupported
from llava_interleave.options import Options
from tests.helpers.batches import openai, shard
from tests.helpers.benchmarks import kill_and_resume, save_image

Asked = Sequence[Sequence[Mapping[str, Any]]]


class Echo:
    """Answers with the last text; keeps what it was asked in one call, and with which options."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], Options]] = []

    def __call__(self, batch: Asked, options: Options) -> list[Reply | LlavaError]:
        texts = [
            m[-1]["content"] if isinstance(m[-1]["content"], str) else m[-1]["content"][-1]["text"]
            for m in batch
        ]
        self.calls.append((texts, options))
        return [
            PromptError("refused") if text == "bad" else Reply(text, "stop", 7, 2) for text in texts
        ]


def lines(path: Path) -> list[JsonRow]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def done(source: Path, answer: ReplyFn, question: str | None = None, **more: Any) -> list[JsonRow]:
    out = source.with_name("out.jsonl")
    out.unlink(missing_ok=True)
    run(Source(source, question), out, answer, Options(), {"model": "m"}, **more)
    return lines(out)


def test_lines_keep_their_order_and_failures_their_place(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    samples: list[Any] = [
        {"id": "a", "question": "one", "images": ["b.png"]},
        {"id": 7, "question": "bad", "image": "c.png"},
        {"messages": [{"role": "user", "content": "three"}]},
        {"id": "d", "images": ["b.png"]},
        {"id": "e", "question": "<image>?", "images": [], "video": None},
        [1],
    ]
    text = (
        "\n".join(map(json.dumps, samples))
        + "\n\n{broken\n"
        + json.dumps({"id": "z", "question": "last", "images": ["b.png"]})
    )
    source.write_text(text)
    rows = done(source, Echo(), batch_size=2)
    assert [row["id"] for row in rows] == ["a", "7", "3", "d", "e", "6", "7", "z"]
    assert [row.get("answer") for row in rows] == [
        "one",
        None,
        "three",
        None,
        None,
        None,
        None,
        "last",
    ]
    assert rows[0] == {
        "id": "a",
        "answer": "one",
        "finish_reason": "stop",
        "usage": {"prompt": 7, "generated": 2},
    }
    errors = [row["error"] for row in rows if "error" in row]
    for error, wanted in zip(
        errors,
        ("refused", "--question", "1 <image>, but", "not a JSON object", "not JSON"),
        strict=True,
    ):
        assert wanted in error
    assert not (tmp_path / "out.jsonl.part").exists()


def test_shared_media_meet(tmp_path: Path) -> None:
    """Also where they are shared through a third sample; the order of the rest is kept."""
    assert order([["a"], ["b"], [], ["a", "c"], ["d"], ["c"], ["b"]]) == [0, 3, 5, 1, 6, 2, 4]
    source = tmp_path / "in.jsonl"
    source.write_text(
        "\n".join(json.dumps({"question": str(i), "images": [f"{i % 3}.png"]}) for i in range(9))
    )
    echo = Echo()
    assert [row["answer"] for row in done(source, echo, batch_size=3)] == [str(i) for i in range(9)]
    assert [texts for texts, _ in echo.calls] == [["0", "3", "6"], ["1", "4", "7"], ["2", "5", "8"]]


def test_tables_and_folders(tmp_path: Path) -> None:
    table = tmp_path / "in.csv"
    table.write_text(
        'id,question,image,image_2,note\nx,"One, or two?",a.png,,1\ny,,a.png,b.mp4,2\nz,a,b,c,d,e\n'
    )
    sample = Source(table, "What?").sample(0)
    parts = [
        {"type": "media", "path": str(tmp_path / "a.png")},
        {"type": "text", "text": "One, or two?"},
    ]
    assert (sample.id, sample.messages[0]["content"]) == ("x", parts)
    media = Source(table, "What?").sample(1).messages[0]["content"][:-1]
    assert [(part["type"], Path(part["path"]).name) for part in media] == [
        ("media", "a.png"),
        ("media", "b.mp4"),
    ]
    assert "more cells" in str(Source(table).sample(2).error)
    table.write_bytes(b"question\n\xff\n")
    with pytest.raises(DataError, match="UTF-8"):
        Source(table)
    folder = tmp_path / "album"
    for name in ("10.png", "9.png", "set/2.png", "set/10.png"):
        save_image(folder / name)
    (folder / "notes.txt").write_text("-")
    (folder / "empty").mkdir()
    samples = [Source(folder, "What?").sample(i) for i in range(3)]
    assert [s.id for s in samples] == ["9.png", "10.png", "set"]
    assert [Path(p["path"]).name for p in samples[2].messages[0]["content"][:-1]] == [
        "2.png",
        "10.png",
    ]
    assert len(Source(folder)) == 3


def test_parquet(tmp_path: Path) -> None:
    """Paths in it are paths; images in it are theirs as they are, and the order stays
    the file's.
    """
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "in.parquet"
    parquet.write_table(
        pyarrow.table({"question": ["one", "two"], "images": [["a.png"], ["b.mp4", "a.png"]]}), path
    )
    source = Source(path)
    contents = [source.sample(i).messages[0]["content"] for i in range(2)]
    assert [[p["path"] for p in content[:-1]] for content in contents] == [
        [str(tmp_path / "a.png")], [str(tmp_path / "b.mp4"), str(tmp_path / "a.png")],
    ]  # fmt: skip
    assert set(source.media(0)) < set(source.media(1))
    cells = [{"bytes": b"image", "path": None}, {"bytes": b"video", "path": "x.MP4"}]
    parquet.write_table(pyarrow.table({"image": cells, "id": [7, 8]}), path, row_group_size=1)
    other = Source(path, "What?")
    assert [other.sample(i).messages[0]["content"][0] for i in range(2)] == [
        {"type": "image", "image": b"image"}, {"type": "video", "video": b"video"},
    ]  # fmt: skip
    assert (other.sample(1).id, other.media(1)) == ("8", [])
    assert other.digest != source.digest
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="Parquet"):
        Source(path)


def test_parquet_is_refused_by_name_without_pyarrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "in.parquet").write_bytes(b"")
    with pytest.raises(Unsupported, match=r"pyarrow.*llava-interleave\[parquet\]"):
        Source(tmp_path / "in.parquet")


def test_shards_are_grouped_as_webdataset_does(tmp_path: Path) -> None:
    """Neighbours with what stands before the first dot of the last part of the name; across shards
    nothing is joined.
    """
    folder = tmp_path / "shards"
    folder.mkdir()
    shard(folder / "x-10.tar", ("b/1.jpg", b"last"), ("b/1.txt", b"not read"))
    shard(
        folder / "x-9.tar",
        ("a.v1/1.left.JPG", b"l"), ("a.v1/1.json", b'{"question": "Same?"}'),
        ("a.v1/1.right.jpg", b"r"),
        ("a.v1/2.mp4", b"video"),
        ("a.v1/2.json", b'{"id": 5, "url": "https://x", "image_path": "/etc/passwd"}'),
        ("a.v1/.hidden", b"-"), ("noext", b"-"), ("__meta__/a.jpg", b"-"),
        ("a.v1/1.png", b"again"), ("b/1.jpg", b"first"),
    )  # fmt: skip
    source = Source(folder, "What?")
    samples = [source.sample(i) for i in range(len(source))]
    assert [s.id for s in samples] == ["a.v1/1", "5", "a.v1/1", "b/1", "b/1"]
    assert [s.messages[0]["content"] for s in samples] == [
        [
            {"type": "image", "image": b"l"},
            {"type": "image", "image": b"r"},
            {"type": "text", "text": "Same?"},
        ],
        [{"type": "video", "video": b"video"}, {"type": "text", "text": "What?"}],
        [{"type": "image", "image": b"again"}, {"type": "text", "text": "What?"}],
        [{"type": "image", "image": b"first"}, {"type": "text", "text": "What?"}],
        [{"type": "image", "image": b"last"}, {"type": "text", "text": "What?"}],
    ]
    assert [row["id"] for row in done(folder, Echo(), "What?")] == [
        "a.v1/1",
        "5",
        "a.v1/1",
        "b/1",
        "b/1",
    ]
    one = Source(folder / "x-9.tar", "What?")
    assert (len(one), one.digest == source.digest) == (4, False)


def test_shards_are_read_safely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links and devices are no files, names lead nowhere, a member that is too large is its
    sample's error alone.
    """
    path = tmp_path / "in.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("a.jpg", tarfile.SYMTYPE),
            ("b.jpg", tarfile.LNKTYPE),
            ("c.jpg", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name, data in (
            ("../../d.jpg", b"d"),
            ("e.jpg", b"e" * 9),
            ("f.json", b"[1]"),
            ("g.json", b"{"),
            ("h.jpg", b"h"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    monkeypatch.setattr("llava_interleave.batch.webdataset.MAX_BYTES", 8)
    before = set(tmp_path.parent.rglob("*"))
    rows = done(path, Echo(), "What?")
    assert [row["id"] for row in rows] == ["../../d", "e", "f", "g", "h"]
    assert [row.get("answer") for row in rows] == ["What?", None, None, None, "What?"]
    for row, wanted in zip(
        rows[1:4],
        ("has 9 bytes, above the limit of 8", "is not an object", "not JSON"),
        strict=True,
    ):
        assert wanted in row["error"]
    assert set(tmp_path.parent.rglob("*")) - before == {tmp_path / "out.jsonl"}
    whole = path.read_bytes()
    for broken in (b"no tar at all", whole[: whole.index(b"e" * 9) - 600]):
        path.write_bytes(broken)
        with pytest.raises(
            DataError, match=r"in\.tar (cannot be read as an uncompressed tar file|has no samples)"
        ):
            Source(path, "What?")
    shard(path, ("a.jpg", b"a"))
    packed = gzip.compress(path.read_bytes())
    path.write_bytes(packed)
    with pytest.raises(DataError, match="uncompressed"):
        Source(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("in.txt", "x"), ("in.jsonl", "\n\n"), ("in.csv", "question\n"), ("none.jsonl", None)],
)
def test_invalid_sources(name: str, content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=name):
        Source(tmp_path / name)


def test_openai_batches(tmp_path: Path) -> None:
    """Its options hold for the sample alone; its answers have its form; what is not offered is
    reported with the sample.
    """
    source = tmp_path / "in.jsonl"
    bodies = [
        {},
        {"max_tokens": 3, "temperature": 0.5, "stop": ["x"]},
        {"tools": []},
        {"n": 1, "stream": False},
        {"seed": "s"},
        {"n": 2},
    ]
    samples = [openai(i, **body) for i, body in enumerate(bodies)] + [
        openai(9) | {"url": "/v1/embeddings"},
        openai(8) | {"method": "GET"},
    ]
    samples.append(
        {
            "custom_id": "r-10",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": "bad"}]},
        }
    )
    source.write_text("\n".join(map(json.dumps, samples)))
    echo = Echo()
    rows = done(source, echo)
    assert [row["custom_id"] for row in rows] == [
        "r-0",
        "r-1",
        "r-2",
        "r-3",
        "r-4",
        "r-5",
        "r-9",
        "r-8",
        "r-10",
    ]
    assert [row["response"]["status_code"] for row in rows] == [
        200,
        200,
        400,
        200,
        400,
        400,
        400,
        400,
        400,
    ]
    body = rows[1]["response"]["body"]
    parsed = ChatCompletion.model_validate(body, strict=True)  # OpenAI's own type
    assert (parsed.choices[0].message.content, parsed.choices[0].finish_reason, parsed.model) == (
        "1",
        "stop",
        "m",
    )
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    assert "tools" in rows[2]["response"]["body"]["error"]["message"]
    assert [
        (o.max_new_tokens, o.temperature, o.stop) for texts, o in echo.calls if texts == ["1"]
    ] == [(3, 0.5, ("x",))]
    assert len({row["id"] for row in rows}) == len(rows)


def test_nothing_is_overwritten_or_mixed(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"question": "one"}\n{"question": "two"}\n')

    def stops(_asked: Asked, _options: Options) -> list[Reply | LlavaError]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Source(source), out, stops, Options(), {"model": "m"})
    assert not out.exists()
    with pytest.raises(DataError, match="made with model 'm', not 'n'"):
        run(Source(source), out, Echo(), Options(), {"model": "n"})
    source.write_text(source.read_text() + '{"question": "three"}\n')
    with pytest.raises(DataError, match="made with input"):
        run(Source(source), out, Echo(), Options(), {"model": "m"})
    out.write_text("mine")
    with pytest.raises(DataError, match="already exists"):
        run(Source(source), out, Echo(), Options(), {"model": "m"})
    assert out.read_text() == "mine"


def test_a_mistake_in_a_samples_options_is_its_own(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(
        "\n".join(json.dumps(openai(i, **({"stop": 3} if i == 1 else {}))) for i in range(3))
    )
    assert [row["response"]["status_code"] for row in done(source, Echo())] == [200, 400, 200]
    with pytest.raises(OptionError):
        Options(stop=("",))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need fork")
def test_killed_runs_lose_and_double_nothing(tmp_path: Path) -> None:
    """Order kept, every sample once, whatever moment the kill came; the output is never there in
    part.
    """
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chance = random.Random(3)
    source.write_text(
        "\n".join(
            json.dumps({"question": str(i), "images": [f"{chance.randrange(9)}.png"]})
            for i in range(400)
        )
    )

    def work() -> None:
        if out.exists():
            assert len(lines(out)) == 400
            return

        def answer(batch: Asked, _options: Options) -> list[Reply | LlavaError]:
            time.sleep(0.004)
            return [Reply(m[-1]["content"][-1]["text"], "stop", 1, 1) for m in batch]

        run(Source(source), out, answer, Options(), {}, batch_size=2)

    assert kill_and_resume(work, chance) == 20
    assert [row["answer"] for row in lines(out)] == [str(i) for i in range(400)]
