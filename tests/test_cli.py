"""The command line: what it prints where, and its exit codes."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from llava_interleave import __main__ as command
from llava_interleave.cli import reference, terminal
from tests.helpers.cli import llava

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "red.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


def test_docs_are_what_the_program_says() -> None:
    assert (ROOT / "docs" / "cli.md").read_text("utf-8") == reference(), (
        "run `llava reference > docs/cli.md`"
    )


def test_ask(tiny: Path, red: Path) -> None:
    """Streamed, whole and as JSON are the same text, and stdout has nothing else."""
    words = ("ask", "-m", tiny, "-a", red, "-a", red.parent, "--max-new-tokens", 9, "What is it?")
    streamed, whole, as_json = llava(*words), llava(*words, "--no-stream"), llava(*words, "--json")
    assert (streamed.code, whole.code, as_json.code) == (0, 0, 0), streamed.err
    report = json.loads(as_json.out)
    assert streamed.out == whole.out == report["text"] + "\n"
    assert streamed.err == ""
    assert report["usage"]["generated"] == len(report["tokens"]) <= 9
    assert report["usage"]["prompt"] > 2 * 16


def test_standard_input(tiny: Path, red: Path) -> None:
    by_name = llava("ask", "-m", tiny, "-a", red, "--max-new-tokens", 5, "What?")
    assert by_name.code == 0
    assert (
        llava(
            "ask", "-m", tiny, "-a", "-", "--max-new-tokens", 5, "What?", stdin=red.read_bytes()
        ).out
        == by_name.out
    )
    assert (
        llava("ask", "-m", tiny, "-a", red, "--max-new-tokens", 5, "-", stdin=b"What?\n").out
        == by_name.out
    )


def test_several_answers_and_views(tiny: Path, red: Path) -> None:
    views = ("--view", f"front={red}", "--view", f"left={red}")
    done = llava(
        "ask",
        "-m",
        tiny,
        *views,
        "-n",
        2,
        "--temperature",
        50,
        "--seed",
        1,
        "--json",
        "--max-new-tokens",
        4,
        "Hm?",
    )
    answers = json.loads(done.out)["answers"]
    assert len(answers) == 2
    assert answers[0]["tokens"] != answers[1]["tokens"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("-a", "missing.png", "What?"), 2, "missing.png"),
        (("--top-p", "7", "What?"), 2, "top_p"),
        (("--view", "front.png", "What?"), 2, "NAME=FILE"),
        (("-a", "-", "-"), 2, "not both"),
        (("--logprobs", "2", "What?"), 2, "--json"),
        (("--max-new-tokens", "100000", "What?"), 2, "context"),
    ],
)
def test_errors_are_one_line(tiny: Path, words: tuple[str, ...], code: int, says: str) -> None:
    done = llava("ask", "-m", tiny, *words)
    assert done.code == code
    assert done.out == ""
    assert says in done.err
    assert done.err.count("\n") == 1


def test_placeholders_without_an_attachment(tiny: Path, red: Path) -> None:
    done = llava("ask", "-m", tiny, "<image> and <image>?", "-a", red)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "2 <image> but 1 attachments" in done.err


def test_unknown_model() -> None:
    done = llava("ask", "-m", "./nowhere", "What?")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)


def test_plan_counts_what_ask_uses(tiny: Path, red: Path) -> None:
    planned = json.loads(llava("estimate", "-m", tiny, "-a", red, "What is it?", "--json").out)
    used = json.loads(
        llava("ask", "-m", tiny, "-a", red, "What is it?", "--json", "--max-new-tokens", 1).out
    )
    assert planned["total"] == used["usage"]["prompt"]
    table = llava("estimate", "-m", tiny, "-a", red, "What is it?")
    assert str(planned["total"]) in table.out


def test_chat(tiny: Path, red: Path, tmp_path: Path) -> None:
    """Attach, ask, take back, save; a second program goes on where the first stopped."""
    file = tmp_path / "talk.json"
    lines = f"/attach {red}\nWhat is it?\nAnd \\\nnow?\n/undo\n/save {file}\n/nonsense\n/quit\n"
    first = llava("chat", "-m", tiny, "--max-new-tokens", 3, stdin=lines.encode())
    assert first.code == 0, first.err
    assert "unknown command /nonsense" in first.err
    saved = json.loads(file.read_text())
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"]
    assert saved["messages"][0]["content"][0] == {"type": "image", "path": str(red)}
    second = llava(
        "chat", "-m", tiny, "--max-new-tokens", 3, "--resume", file, stdin=b"More?\n/save\n"
    )
    assert second.code == 0, second.err
    assert len(json.loads(file.read_text())["messages"]) == 4


def test_convert_and_ask_again(tiny: Path, tmp_path: Path) -> None:
    for layout in ("original", "transformers-5"):
        done = llava("convert", tiny, tmp_path / layout, "--layout", layout, "--dtype", "float32")
        assert done.code == 0, done.err
        answers = [
            llava("ask", "-m", m, "Hello?", "--max-new-tokens", 4).out
            for m in (tiny, tmp_path / layout)
        ]
        assert answers[0] == answers[1]
    again = llava("convert", tiny, tmp_path / "original")
    assert (again.code, again.err.count("\n")) == (2, 1)


@pytest.mark.slow
def test_closed_pipe_is_quiet(tiny: Path) -> None:
    program = f"{sys.executable} -c 'from llava_interleave.cli import main; main()'"
    command = f"{program} ask -m {tiny} Hello --ignore-eos --max-new-tokens 2000 | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, cwd=ROOT)
    assert done.stderr == b""


def test_ctrl_c_during_imports_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Importing(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "llava_interleave.cli", Importing("llava_interleave.cli"))
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert (ended.value.code, capsys.readouterr().err) == (130, "llava: interrupted\n")


def run_in(encoding: str, *words: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The program in a process of its own, whose standard streams have `encoding`."""
    code = "import sys; from llava_interleave.cli import main; main()"
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932"])
def test_text_reaches_every_console(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters that the console cannot show are escaped; JSON stays JSON."""
    text = "\u2192 \U0001f600 caf\u00e9 \u65e5"
    stream = io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    terminal.tolerate_encodings()
    print(text)
    terminal.print_json({"text": text})
    terminal.table("\u2192", ["\u65e5", "a"], [["\U0001f600", "1"]])
    shown, encoded, *_ = stream.buffer.getvalue().decode(encoding).splitlines()  # type: ignore[attr-defined]
    assert "\\U0001f600" in shown
    assert json.loads(encoded) == {"text": text}


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932"])
def test_an_answer_reaches_every_console(encoding: str, tiny: Path) -> None:
    done = run_in(encoding, "ask", "-m", tiny, "-", "--max-new-tokens", 8, stdin=b"\xff\xfe?")
    assert (done.returncode, done.stderr) == (0, b"")


def test_files_by_pattern_and_as_arguments(tiny: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        Image.new("RGB", (20, 20), "red").save(tmp_path / f"{name}.png")
    files = sorted(tmp_path.glob("*.png"))
    few = ("-m", tiny, "--max-new-tokens", 1, "--json")
    counts = [
        json.loads(llava("ask", *words, *few).out)["usage"]["prompt"]
        for words in (
            ("-a", tmp_path / "*.png", "What?"),  # a pattern that no shell expanded
            ("-a", *files, "What?"),  # as a shell expands -a *.png
            ("What?", *files),
            ("-a", files[0], "-a", files[1], "-a", files[2], "What?"),
        )
    ]
    assert len(set(counts)) == 1
    estimate = json.loads(llava("estimate", "What?", tmp_path / "*.png", "-m", tiny, "--json").out)
    assert estimate["total"] == counts[0]
    none = llava("ask", "-m", tiny, "-a", tmp_path / "*.jpg", "What?")
    assert none.code == 2 and "no file matches" in none.err
    silent = llava("ask", "-m", tiny, *files)
    assert silent.code == 2 and "no question" in silent.err
    lines = f"/attach {tmp_path}/*.png\nWhat?\n/quit\n".encode()
    talk = llava("chat", "-m", tiny, "--max-new-tokens", 1, stdin=lines)
    assert (talk.code, talk.err.count("image: ")) == (0, 3), talk.err
    assert llava("chat", "-m", tiny, *files, stdin=b"").err.count("image: ") == 3


def test_a_limit_is_named_and_changed_by_a_flag(tiny: Path, red: Path) -> None:
    words = ("ask", "-m", tiny, "-a", red, "What?", "--max-new-tokens", 1)
    assert llava(*words, "--limit", "image_pixels=1200").code == 0
    done = llava(*words, "--limit", "image_pixels=1199")
    assert done.code == 2
    assert "more than the limit of 1,199 pixels" in done.err
    assert "--limit image_pixels=VALUE changes it" in done.err
    assert done.err.count("\n") == 1
    for value, says in (
        ("image_pixel=3", "did you mean 'image_pixels'"),
        ("image_pixels=many", "takes a whole number, not 'many'"),
        ("image_pixels", "takes a whole number"),
        ("allow_private=yes", "takes true or false"),
    ):
        assert says in llava(*words, "--limit", value).err
