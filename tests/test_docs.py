"""Every code block of the README runs, in a folder with the files of `llava demo`."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from llava_interleave.chat import BUILTIN
from llava_interleave.cli import app, demo
from llava_interleave.testing import tiny_checkpoint
from recipes.tiny_world import Question
from recipes.tiny_world import demo as recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NOT_RUN = "<!-- not run: needs the network and a published checkpoint -->\n"
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = [
    (README.count("\n", 0, found.start()) + 1, found[2], found[3])
    for found in re.finditer(
        r"^(<!--[^\n]*-->\n)?```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL
    )
    if found[1] != NOT_RUN
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with demo/ in it, and a model of random weights for a clone that has no built-in one."""
    folder = tmp_path_factory.mktemp("readme")
    demo.copy_files(folder / "demo")
    if not (BUILTIN / "config.json").is_file():
        tiny_checkpoint(folder / "builtin")
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    if (folder / "builtin").is_dir():
        monkeypatch.setattr("llava_interleave.chat.loading.BUILTIN", folder / "builtin")


@pytest.mark.parametrize(
    ("line", "language", "code"), BLOCKS, ids=[f"line {line}" for line, _, _ in BLOCKS]
)
def test_block(
    line: int, language: str, code: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if language == "python":
        exec(compile(code, f"README.md:{line}", "exec"), {})
        # Random weights may write nothing that can be seen.
        assert capsys.readouterr().out.strip() or (folder / "builtin").is_dir()
        return
    assert language == "sh"
    for command in code.splitlines():
        words = shlex.split(command)
        if words[0] == "make":
            known = shutil.which("make") and subprocess.run(
                ["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True
            )
            assert not known or known.returncode == 0, known.stderr
            continue
        assert words[0] == "llava"
        done = CliRunner().invoke(app, words[1:], input="")
        assert done.exit_code == 0, (command, done.output, done.exception)


def test_few_blocks_are_not_run() -> None:
    assert README.count("<!--") == README.count(NOT_RUN) <= 2
    assert len(BLOCKS) + README.count(NOT_RUN) == len(re.findall(r"^```\w+$", README, re.MULTILINE))


@pytest.mark.parametrize(
    "document",
    sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")),
    ids=lambda path: path.name,
)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text("utf-8")):
        assert (document.parent / link).exists(), link


def test_the_demo_answers_and_counts(tmp_path: Path) -> None:
    """Every question is a command line that can be copied, and the follow-up shows how much was cached."""
    tiny = tiny_checkpoint(tmp_path / "tiny")
    done = CliRunner().invoke(app, ["demo", "--folder", "shown", "-m", str(tiny)])
    assert done.exit_code == 0, done.exception
    asked = [line[2:] for line in done.output.splitlines() if line.startswith("$ llava ask")]
    exhibits = demo.exhibits()
    total = sum(len(exhibit.questions) for exhibit in exhibits)
    assert len(asked) == sum(len(exhibit.questions) for exhibit in exhibits if not exhibit.chat)
    assert re.search(rf"^\d+ of {total} right", done.output, re.MULTILINE)
    cached, prompt = map(
        int, re.findall(r"(\d+) of (\d+) prompt tokens were cached", done.output)[0]
    )
    assert 0 < cached < prompt
    copied = CliRunner().invoke(app, [*shlex.split(asked[-1])[1:], "--max-new-tokens", "2"])
    assert copied.exit_code == 0, copied.output


def test_the_shipped_demo_is_what_its_recipe_writes(tmp_path: Path) -> None:
    """The same questions and pixels; H.264 files differ from encoder to encoder."""
    recipe.write(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in demo.FILES.iterdir())
    assert sum((demo.FILES / name).stat().st_size for name in names) < 150_000
    assert (tmp_path / "demo.json").read_text() == (demo.FILES / "demo.json").read_text()
    for name in names:
        if name.endswith(".png"):
            with Image.open(tmp_path / name) as drawn, Image.open(demo.FILES / name) as shipped:
                assert drawn.tobytes() == shipped.tobytes(), name


def test_answers_of_the_demo_are_judged_as_those_of_the_world() -> None:
    for text in ("4", " 4.", "two and two: 4", "5", "4: 5", "4 things"):
        assert demo.is_right(text, "4") == Question("count", "4").is_answered(text)
