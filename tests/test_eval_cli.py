"""`llava eval` and `llava batch` as a person types them: results, resuming, comparison, a server,
errors.
"""

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llava_interleave import load
from llava_interleave.cli import terminal
from llava_interleave.cli.local_model import LazyModel, ModelFlags, answer_all
from llava_interleave.errors import LlavaError, OptionError
from llava_interleave.journal import read
from llava_interleave.options import Options
from recipes.tiny_world import benchmark
from tests.helpers.batches import openai, shard
from tests.helpers.benchmarks import BROKEN, WHOLE, bench, embedded, made, parquet, save_image
from tests.helpers.cli import llava

pytestmark = pytest.mark.slow

WORLD = "recipes.tiny_world.benchmark:World"


@pytest.mark.slow
def test_a_custom_task_resumes_and_reports(tiny: Path, tmp_path: Path) -> None:
    """In two runs and with a file it scores as `evaluate` does; no question is asked twice."""
    words = ("eval", WORLD, "--task-option", "scenario=single,views", "-m", tiny, "--json")
    first = llava(*words, "-n", 1, "-o", tmp_path)
    assert first.code == 0, first.err
    path = tmp_path / "world.jsonl"
    early = path.read_bytes()
    second = llava(
        *words, "-n", 3, "-o", tmp_path, "--html", "--save-errors", tmp_path / "errors.jsonl"
    )
    assert second.code == 0, second.err
    assert path.read_bytes().startswith(early)
    bot, lines = load(tiny), json.loads(second.out)["world"]["means"]
    errors = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    for scenario in ("single", "views"):
        score = benchmark.evaluate(
            lambda a: [x.text for x in bot.batch(a, max_new_tokens=80)], scenario, 3, held_out=False
        )
        (line,) = [line for line in lines if line["name"] == scenario]
        assert (line["mean"], line["examples"]) == (score.accuracy, 3)
        assert [
            (int(row["id"].split("/")[1]), row["question"], row["truth"], row["answer"])
            for row in errors
            if row["group"] == scenario
        ] == score.wrong
    page = (tmp_path / "world.html").read_text()
    assert page.count("<article") == 6 and "max_new_tokens 80</tr>" in page
    run, rows = read(path)
    assert len(rows) == 6
    assert len(run["fingerprint"]) == 32
    assert run["sampling"] == {"temperature": 0.0, "max_new_tokens": 80, "frames": None}
    assert (run["precision"], run["preset"], run["geometry"], run["data"]) == (
        "float32",
        "interleave",
        "squash",
        "training wordings, level normal",
    )
    assert {"torch", "llava-interleave", "numpy"} <= run["versions"].keys()
    for flag, value, says in (
        ("--task-option", "held_out=true", "held-out"),
        ("--task-option", "level=hard", "level hard"),
        ("--orders", "2", "'orders': 2"),
    ):
        other = llava(*words, "-n", 3, "-o", tmp_path, flag, value)
        assert (other.code, other.out) == (2, "")
        assert says in other.err


def test_several_orders_of_the_images(tiny: Path, tmp_path: Path) -> None:
    words = ("eval", WORLD, "-m", tiny, "-n", 4, "--task-option", "scenario=multi")
    done = llava(*words, "--max-new-tokens", 2, "--orders", 2, "-o", tmp_path)
    assert done.code == 0, done.err
    run, rows = read(tmp_path / "world.jsonl")
    assert run["sampling"]["orders"] == 2
    assert any(row["error"] is None for row in rows)


def test_options_of_a_task_are_shown_and_not_compared(tiny: Path, tmp_path: Path) -> None:
    words = ("eval", WORLD, "-m", tiny, "-n", 1, "--max-new-tokens", 4)
    for level in ("easy", "hard"):
        options = ("--task-option", "scenario=video", "--task-option", f"level={level}")
        done = llava(*words, *options, "-o", tmp_path / level, "--html")
        assert done.code == 0, done.err
        assert f"tiny: world, training wordings, level {level}" in done.out
        assert "95 % interval" in done.out
        page = (tmp_path / level / "world.html").read_text()
        assert f"training wordings, level {level}" in page
        intervals = re.findall(r"[\d.]+% to [\d.]+%", done.out)
        assert intervals and intervals == re.findall(r"[\d.]+% to [\d.]+%", page)
    other = llava("eval", "diff", tmp_path / "easy/world.jsonl", tmp_path / "hard/world.jsonl")
    assert (other.code, other.out) == (2, "")
    assert "'training wordings, level easy' and 'training wordings, level hard'" in other.err


def test_a_custom_task_is_imported_from_the_working_directory(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_tasks.py").write_text(
        "from llava_interleave.evals.task import Example, Task\n"
        "def count(*, questions: int = 3, word: str = 'a') -> Task:\n"
        "    examples = [\n"
        "        Example(id=str(i), group='all', question=word * i, truth='', scorer=lambda text: "
        "1.0,\n"
        "            ask=lambda folder, i=i: [{'role': 'user', 'content': word * (i + 1)}])\n"
        "        for i in range(questions)\n"
        "    ]\n"
        "    return Task(name='count', examples=examples, max_new_tokens=2)\n"
        "def nothing() -> None: ...\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ("eval", "own_tasks:count", "-m", tiny, "--json", "--task-option", "questions=2")
    done = llava(*words, "--task-option", "word=b", "-o", tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out)["count"]["means"][0]["examples"] == 2
    assert [row["question"] for row in read(tmp_path / "count.jsonl")[1]] == ["", "b"]
    other = llava("eval", "own_tasks:nothing")
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert "makes a NoneType, not a Task" in other.err


def test_bench_and_diff(tiny: Path, tmp_path: Path) -> None:
    bench(tmp_path, [*WHOLE, BROKEN[0][0]])
    words = ("eval", "interleave-in", "-m", tiny, "--data", tmp_path, "--max-new-tokens", 4)
    done = llava(*words, "-o", tmp_path / "a")
    assert done.code == 0, done.err
    assert "1 broken samples were left out" in done.err
    assert "made with float16" in done.out.replace("\n", " ")
    report = json.loads(
        llava(*words, "-n", 1, "-o", tmp_path / "b", "--as-published", "--json").out
    )
    assert report["interleave-in"]["run"]["preset"] == "official"
    assert {
        line["name"]: line["examples"]
        for line in report["interleave-in"]["means"]
        if line["kind"] == "group"
    } == {
        "RAVEN": 1,
        "Spot-the-Diff": 1,
        "CLEVR-Change": 1,
    }
    files = [str(tmp_path / name / "interleave-in.jsonl") for name in "ab"]
    compared = json.loads(llava("eval", "diff", *files, "--json").out)
    assert compared["changed"] == {"as_published": [False, True]}
    assert compared["only_in"] == [4, 0]
    assert compared["differences"][-1]["pairs"] == 3
    table = llava("eval", "diff", *files).out
    assert "as_published: False | True" in table
    assert "4 examples only in A" in table
    checked = llava("eval", "interleave-in", "--data", tmp_path, "--check")
    assert (checked.code, checked.out.count("\n")) == (1, 1)


def test_batch_answers_like_asking(tiny: Path, tmp_path: Path) -> None:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        save_image(tmp_path / name, colour)
    samples: list[dict[str, Any]] = [
        {"id": "1", "question": "What?", "images": ["a.png"]},
        {"id": "2", "question": "What?", "images": ["missing.png"]},
        {"id": "3", "question": "In <image> and <image>?", "images": ["b.png", "a.png"]},
        {"id": "4", "question": "Hm?"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, samples)))
    done = llava(
        "batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "-m", tiny, "--max-new-tokens", 6
    )
    assert done.code == 1, done.err
    assert "4 samples, 1 with an error" in done.err and "missing.png" in done.err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    bot = load(tiny)
    for row, sample in zip(rows, samples, strict=True):
        if row["id"] == "2":
            assert "missing.png" in row["error"]
        else:
            files = [tmp_path / name for name in sample.get("images", [])]
            assert row["answer"] == bot.ask(sample["question"], files, max_new_tokens=6).text


def test_shards_and_tables_answer_like_asking(tiny: Path, tmp_path: Path) -> None:
    """An image within a shard or a Parquet file is the image in a file next to it."""
    save_image(tmp_path / "a.png", "red")
    save_image(tmp_path / "b.png", "blue")
    data = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    shard(
        tmp_path / "in.tar",
        ("1.left.png", data[0]),
        ("1.right.png", data[1]),
        ("2.png", b"no image"),
    )
    words = ("-m", tiny, "--max-new-tokens", 6, "--question", "Same?")
    assert llava("batch", tmp_path / "in.tar", tmp_path / "out.jsonl", *words).code == 1
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    alone = load(tiny).ask("Same?", [tmp_path / "a.png", tmp_path / "b.png"], max_new_tokens=6)
    assert (rows[0]["answer"], rows[0]["usage"]["prompt"]) == (alone.text, alone.usage.prompt)
    assert (rows[1]["id"], "not an image" in rows[1]["error"]) == ("2", True)
    parquet(
        tmp_path / "in.parquet",
        [{"id": "1", "image_1": embedded("red"), "image_2": embedded("blue")}],
    )
    assert llava("batch", tmp_path / "in.parquet", tmp_path / "table.jsonl", *words).code == 0
    (row,) = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert row["usage"] == rows[0]["usage"]


def test_published_tasks_run(tiny: Path, tmp_path: Path) -> None:
    """Embedded images reach the model and the report; figures stand next to the means."""
    for name in ("blink", "pope"):
        made(tmp_path, name)
    save_image(tmp_path / "pope/val2014/COCO_val2014_000000310196.jpg")
    out = tmp_path / "out"
    done = llava(
        "eval",
        "blink",
        "pope",
        "-m",
        tiny,
        "--data",
        tmp_path,
        "-o",
        out,
        "--html",
        "--json",
        "--max-new-tokens",
        2,
    )
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert [line["name"] for line in report["blink"]["means"]] == [
        "Counting",
        "Jigsaw",
        "average",
        "all examples",
    ]
    names = [line["name"] for line in report["pope"]["means"]]
    assert {"random", "popular: F1", "all examples: share of yes"} <= set(names)
    assert all(line["failed"] == 0 for task in report.values() for line in task["means"])
    assert (out / "blink.html").read_text().count("<img") == 4


def test_a_wrong_option_is_reported_once(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"question": "a"}\n{"question": "b"}\n')
    done = llava("batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "-m", tiny, "--top-p", 7)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert not (tmp_path / "out.jsonl").exists()
    model = LazyModel(ModelFlags(str(tiny)))
    missing = [{"type": "image", "path": str(tmp_path / "missing.png")}]
    questions = [
        [{"role": "user", "content": content}] for content in ("ok", missing, "fine", missing)
    ]
    said = answer_all(model.ready(Options()).batch, questions, Options(max_new_tokens=2))
    assert [isinstance(one, LlavaError) for one in said] == [False, True, False, True]
    with pytest.raises(OptionError):
        model.ready(Options(preset="none"))


def test_a_samples_own_options_fail_alone(tiny: Path, tmp_path: Path) -> None:
    rows = [openai(0, temperature=-1), openai(1, max_tokens=2), openai(2, max_tokens=10**6)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = llava("batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "-m", tiny)
    assert done.code == 1, done.err
    errors = [
        json.loads(line)["response"] for line in (tmp_path / "out.jsonl").read_text().splitlines()
    ]
    assert [one["status_code"] for one in errors] == [400, 200, 400]
    assert errors[1]["body"]["usage"]["completion_tokens"] <= 2


class Server(BaseHTTPRequestHandler):
    """Says how many images it was sent; is busy at first, and refuses a question with `moved`."""

    busy = 1
    bodies: list[dict[str, Any]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "their-model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer secret":
            return self.reply(401, {"error": "who are you?"})
        if Server.busy:
            Server.busy -= 1
            return self.reply(503, {"error": "busy"})
        Server.bodies.append(body)
        content = json.dumps(body["messages"][-1]["content"])
        if "two pieces" in content:
            return self.reply(400, {"error": {"message": "too many images"}})
        text = str(content.count("data:image/png;base64,"))
        return self.reply(200, {"choices": [{"message": {"role": "assistant", "content": text}}]})

    def reply(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_server_answers_the_questions(url: str, tmp_path: Path) -> None:
    """Files travel as data URLs; busy is waited for, a refusal is the sample's own, a wrong key
    ends the run.
    """
    key = tmp_path / "key"
    key.write_text("wrong\n")
    samples = [
        *WHOLE[:2],
        {
            **WHOLE[2],
            "conversations": [
                {"from": "human", "value": "<image> two pieces <image>"},
                {"from": "gpt", "value": "x"},
            ],
        },
    ]
    words = (
        "eval",
        "interleave-in",
        "--url",
        url,
        "--key-file",
        key,
        "--data",
        bench(tmp_path, samples),
        "-o",
        tmp_path,
        "--json",
    )
    refused = llava(*words)
    assert (refused.code, refused.out) == (2, "")
    assert "401" in refused.err
    key.write_text("secret\n")
    done = llava(*words)
    assert done.code == 0, done.err
    run, rows = read(tmp_path / "interleave-in.jsonl")
    assert [row["answer"] for row in rows] == ["2", "2", ""]
    assert "too many images" in rows[2]["error"]
    assert (run["model"], run["precision"]) == ("their-model", "the server's")
    assert all(
        (body["model"], body["temperature"], body["max_tokens"]) == ("their-model", 0, 1024)
        for body in Server.bodies
    )
    refused = llava("eval", WORLD, "-n", 1, "--url", "http://127.0.0.1:9/v1", "-m", "x")
    assert (refused.code, refused.err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("eval", "poep"), "did you mean 'pope'"),
        (("eval", WORLD, "--task-option", "scenario=dance"), "single, video, views"),
        (("eval", WORLD, "--task-option", "level=harder"), "did you mean 'hard'"),
        (("eval", WORLD, "--task-option", "levle=hard"), "questions, scenario, level, held_out"),
        (("eval", WORLD, "--task-option", "level"), "KEY=VALUE"),
        (("eval", WORLD, "--task-option", "level=hard", "--frames", "4"), "leave out --frames"),
        (("eval", "recipes.tiny_world.benchmark:Wrold"), "no class or function 'Wrold'"),
        (("eval", "no_such_module:Task"), "no_such_module"),
        (("eval", ":Task"), "ValueError: Empty module name"),
        (("eval", "pope", "--task-option", "level=hard"), "for haystack, world and module:Task"),
        (("eval", WORLD, "--key-file", __file__), "--url"),
        (("eval", "pope", "--check", "-m", "x"), "--model"),
        (("eval", WORLD, "--as-published"), "interleave-in"),
        (("eval", WORLD, "--as", "lmms"), "lmms-eval"),
        (("eval", WORLD, "--as", "lmms-eval"), "lmms-eval has no task"),
        (("eval", "interleave-in", "--as", "lmms-eval", "--as-published"), "choose one"),
        (("eval", WORLD, "--html"), "--out"),
        (
            ("eval", WORLD, "--url", "http://x/v1", "--preset", "hf"),
            "the server's: leave out --preset",
        ),
        (
            ("eval", WORLD, "--url", "http://x/v1", "--video-token-pool", "2"),
            "the server's: leave out --video-token-pool",
        ),
        (("eval", "diff", "a.jsonl", "b.jsonl", "--html"), "leave out --html"),
        (("eval", "diff", "a.jsonl"), "two result files"),
        (("eval", "diff", "a.jsonl", "b.jsonl"), "a.jsonl"),
        (("eval", "qbench"), "llvisionqa_dev.json"),
        (("batch", "in.jsonl", "out.csv"), ".jsonl"),
        (("batch", "none.jsonl", "out.jsonl"), "none.jsonl"),
        (("batch", "none.jsonl", "out.jsonl", "-n", "2"), "one answer"),
    ],
)
def test_errors_are_one_line(
    words: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = llava(*words)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert says in done.err
    assert not list(tmp_path.iterdir())


def test_progress_shows_how_many_and_how_fast(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    with terminal.progress_bar("asking") as tell:
        for done in (50, 51, 52, 53):
            tell(done, 100)
            time.sleep(0.15)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "53/100" in shown
    pace = [float(found) for found in re.findall(r"([\d.e+]+)/s,", shown)]
    assert pace  # the 50 that were there before are not scored_rows as done in no time
    assert all(speed < 20 for speed in pace)
    assert re.search(r"0:00:\d\d", shown)
