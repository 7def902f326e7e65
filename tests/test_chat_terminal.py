"""`llava chat` at a terminal: greeting, commands, completion, history; through a pipe, too."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from llava_interleave import license_notice
from llava_interleave.chat import Chatbot, load
from llava_interleave.cli import line_editor
from llava_interleave.cli.chat import Terminal
from llava_interleave.cli.line_editor import LineEditor, completer
from llava_interleave.errors import PromptError
from llava_interleave.options import Options


@pytest.fixture(scope="module")
def bot(tiny_module: Path) -> Chatbot:
    return load(tiny_module, device="cpu")


@pytest.fixture(scope="module")
def tiny_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llava_interleave.testing import tiny_checkpoint

    return tiny_checkpoint(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture
def session(bot: Chatbot) -> Terminal:
    return Terminal(bot.conversation(), Options(max_new_tokens=3), kv=False)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in ("one", "two", "three")]
    for path in paths:
        Image.new("RGB", (20, 20), "red").save(path)
    return paths


def typed(session: Terminal, *lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter(lines)

    def read() -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    session.run()


def test_retry_replaces_the_last_answer(
    session: Terminal,
    images: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = ["/retry", f"/attach {images[0]}", "What?", f"/attach {images[1]}", "/retry"]
    typed(session, *lines, monkeypatch=monkeypatch)
    output = capsys.readouterr()
    assert "no question to answer again" in output.err
    messages = session.conversation.messages
    assert [turn["role"] for turn in messages] == ["user", "assistant"]
    first, second = output.out.split("\n\n")[:1], output.out
    assert first and second.count(messages[1]["content"][0]["text"]) >= 2
    assert [part["path"] for part in session.conversation.pending] == [str(images[1])]
    typed(session, "And now?", "/retry", monkeypatch=monkeypatch)
    assert len(session.conversation.messages) == 4
    assert len(session.conversation._cache_keys) == 2


def test_a_retry_equals_the_first_answer(bot: Chatbot, images: list[Path]) -> None:
    talk = bot.conversation()
    talk.attach(images[0])
    first = talk.ask("What?", max_new_tokens=5)
    again = [delta.answer for delta in talk.retry(max_new_tokens=5) if delta.answer]
    assert again[0].text == first.text
    stopped = talk.retry(max_new_tokens=50)
    next(stopped)
    stopped.close()
    assert talk.messages[-1]["content"][0]["text"] == first.text
    with pytest.raises(PromptError, match="no question"):
        bot.conversation().retry()


def test_options_are_set_by_name(
    session: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "/set temperature 0.7",
        "/set seed 5",
        "/set ignore_eos true",
        "/set preset official",
        "/set seed none",
        "/set temperature hot",
        "/set temprature 1",
        "/set top_p",
        "/set n 3",
        "/system Answer in French.",
        "/set",
    ]
    typed(session, *lines, monkeypatch=monkeypatch)
    options, errors = session.options, capsys.readouterr().err
    assert (options.temperature, options.seed, options.ignore_eos) == (0.7, None, True)
    assert (options.preset, options.system) == ("official", "Answer in French.")
    assert (
        "temperature must be a number" in errors and "temperature" in errors.split("temprature")[1]
    )
    assert "/set top_p needs a value; it is 1.0" in errors and "top_k = 0" in errors
    assert "unknown option" in errors
    typed(session, "/system none", "Hello", "/system", monkeypatch=monkeypatch)
    assert session.options.system == ""
    assert "system prompt: none" in capsys.readouterr().err


def test_files_are_numbered_and_detached(
    session: Terminal,
    images: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = images[0].parent
    lines = [f"/attach {folder}/*.png", "/detach 2", "/detach 9", "What?", "/files"]
    typed(session, *lines, monkeypatch=monkeypatch)
    errors = capsys.readouterr().err
    assert "3. image" in errors and "numbers from 1 to 2" in errors
    assert "sent 1. image" in errors and "sent 2. image" in errors and "sent 3" not in errors
    typed(session, f"/attach {folder}/*.png", "/detach", monkeypatch=monkeypatch)
    assert session.conversation.pending == []


def test_completion(session: Terminal, images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images[0].parent)
    complete = completer(session.completions())

    def completed(text: str) -> set[str]:
        found = complete.get_completions(Document(text, len(text)), CompleteEvent())
        return {text[: len(text) + one.start_position] + one.text for one in found}

    assert completed("/re") == {"/retry"}
    assert "/attach" in completed("/") and "/quit" in completed("/")
    assert completed("/attach on") == {"/attach one.png"} or completed("/attach on") == {
        "/attach one.png "
    }
    assert completed("/attach one.png t") == {
        "/attach one.png two.png",
        "/attach one.png three.png",
    }
    assert completed("/set temp") == {"/set temperature"}
    assert completed("/set preset o") == {"/set preset official"}
    assert completed("/set ignore_eos t") == {"/set ignore_eos true"}
    assert completed("What is /re") == completed("/none x") == set()


@contextlib.contextmanager
def editor(keys: str) -> Iterator[LineEditor]:
    with create_pipe_input() as pipe:
        pipe.send_text(keys)
        yield LineEditor({"attach": line_editor.PATHS}, input=pipe, output=DummyOutput())


def test_lines_history_and_line_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(license_notice, "state_folder", lambda: tmp_path / "state")
    with editor("first\rsecond\x1b\rline\r\x04") as lines:
        assert [lines.read("> "), lines.read("> ")] == ["first", "second\nline"]
        with pytest.raises(EOFError):
            lines.read("> ")
    history = tmp_path / "state" / "chat_history"
    assert "first" in history.read_text()
    if os.name == "posix":
        assert history.stat().st_mode & 0o077 == 0
    with editor("\x1b[A\x1b[A\x1b[A\r") as lines:  # up over two lines
        assert lines.read("> ") == "first"
    with editor("\x1b[200~pasted\r\ntwo\x1b[201~\r") as lines:
        assert lines.read("> ") == "pasted\ntwo"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a pseudo-terminal")
@pytest.mark.parametrize("words", [["chat", "-m", "MODEL"], []])
def test_a_terminal_is_greeted(tiny_module: Path, tmp_path: Path, words: list[str]) -> None:
    """`llava` alone is the built-in model's chat."""
    import pty

    words = [str(tiny_module) if word == "MODEL" else word for word in words]
    process, terminal = pty.fork()
    if not process:
        os.environ |= {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "COLUMNS": "100"}
        os.execv(sys.executable, [sys.executable, "-m", "llava_interleave", *words])
    shown, sent, end = "", False, time.monotonic() + 100
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.5)[0]:
            try:
                shown += os.read(terminal, 65536).decode("utf-8", "replace")
            except OSError:  # Linux: the other side is closed
                break
        if not sent and "\x1b[?2004h" in shown:  # bracketed paste: it reads lines now
            os.write(terminal, b"/set max_new_tokens 2\r/quit\r")
            sent = True
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, shown
    for text in ("M parameters", "on cpu", "context", "/retry", "/help", "nothing is attached"):
        assert text in shown, (text, shown)
    assert "max_new_tokens = 2" in shown


def test_without_a_terminal_llava_alone_is_its_help() -> None:
    from typer.testing import CliRunner

    from llava_interleave.cli import app

    done = CliRunner().invoke(app, [])
    assert done.exit_code == 2 and "Commands" in done.output and "chat" in done.output


def test_what_is_written_is_said(tiny_module: Path, images: list[Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from llava_interleave.cli import app

    page = tmp_path / "page.html"
    words = ["ask", "-m", str(tiny_module), "What?", str(images[0]), "--attribution", str(page)]
    done = CliRunner().invoke(app, [*words, "--max-new-tokens", "2"])
    assert done.exit_code == 0, done.output
    assert f"wrote {page}" in done.stderr and page.exists()


def test_a_batch_or_a_table_that_is_stopped_says_how_to_continue(
    tiny_module: Path, tmp_path: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from llava_interleave.cli import app

    source = tmp_path / "in.jsonl"
    source.write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": "?"}]}) + "\n" for _ in "ab")
    )

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_interleave.batch.run", interrupted)
    monkeypatch.setattr("llava_interleave.chat.table.TableRun.rows", interrupted)
    table = ["table", str(images[0]), "-c", "what: What?", "-o", str(tmp_path / "out.csv")]
    for words in (["batch", str(source), str(tmp_path / "out.jsonl")], table):
        done = CliRunner().invoke(app, [*words, "-m", str(tiny_module)])
        assert "run the same command again to continue" in done.stderr, done.output
