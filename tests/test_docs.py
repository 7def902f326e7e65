"""The pages hold: commands and Python run on the demo's files, names, flags, links and keys exist.

A block after `<!-- not run: reason -->` is not run, and neither are commands of SLOW; the flags of
every `llava` command are checked all the same. A block after a line that ends with `name.py`: is
written to that file.
"""

import importlib
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from llava_interleave.chat import BUILTIN
from llava_interleave.cli import app, demo
from llava_interleave.testing import tiny_checkpoint
from recipes.tiny_world import Question
from recipes.tiny_world import demo as recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llava_interleave"
PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md"))
WRITTEN = ("CHANGELOG.md", "cli.md")
"""A history with its old names, and a page that another test compares."""
SLOW = {
    "bench": "a minute",
    "mcp": "waits for a client",
    "serve": "waits for requests",
    "train": "tests/test_train_data.py runs the commands of docs/training.md",
    "verify": "half a minute; tests/test_verify.py",
}
TESTED_ELSEWHERE = ("training.md",)
COMMANDS = typer.main.get_group(app).commands
MOSTLY_RUN = ("README.md", "index.md", "images.md", "video.md", "views.md", "python.md")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    not_run: str
    file: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    pattern = (
        r"(?:`(?P<file>[\w.]+)`:\n\n|<!-- not run: (?P<why>[^\n]*) -->\n)?"
        r"^```(?P<language>\w*)\n(?P<code>.*?)^```$"
    )
    return [
        Block(
            page,
            text.count("\n", 0, match.start("code")),
            match["language"],
            match["code"],
            match["why"] or "",
            match["file"] or "",
        )
        for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    ]


BLOCKS = [
    block
    for page in PAGES
    if page.name not in WRITTEN
    for block in blocks(page)
    if block.language in ("sh", "console", "python")
]


def commands(code: str) -> list[str]:
    """The commands of a shell block, one each, continued lines joined."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with demo/, and a model of random weights for a clone that has no built-in one."""
    folder = tmp_path_factory.mktemp("pages")
    demo.copy_files(folder / "demo")
    if not (BUILTIN / "config.json").is_file():
        tiny_checkpoint(folder / "builtin")
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    if (folder / "builtin").is_dir():
        monkeypatch.setattr("llava_interleave.chat.loading.BUILTIN", folder / "builtin")


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block(block: Block, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if block.file:
        Path(block.file).write_text(block.code, "utf-8")
    if block.language == "python":
        code = compile(block.code, str(block), "exec")
        if block.file or block.not_run:
            return
        exec(code, {})
        # Random weights may write nothing that can be seen.
        assert capsys.readouterr().out.strip() or (folder / "builtin").is_dir()
        return
    for command in commands(block.code):
        check_flags(command)
        if not block.not_run and block.page.name not in TESTED_ELSEWHERE:
            run(command)


STARTS = {("llava", word) for word in ("|", "||", "&&", "do", "$SLOT")}
STARTS.add(("llava_interleave", "-m"))


def check_flags(command: str) -> None:
    """Every flag of a `llava` command exists, wherever in a pipeline it stands."""
    words = shlex.split(command)
    for start, word in enumerate(words):
        before = words[start - 1] if start else "|"
        if (word, before) not in STARTS:
            continue
        known = COMMANDS.get(words[start + 1])
        if known is None:
            assert words[start + 1] in ("--help", "--version", "reference"), command
            continue
        below = getattr(known, "commands", {}).get(
            words[start + 2] if start + 2 < len(words) else ""
        )
        flags = {
            flag for one in (known, below) if one for param in one.params for flag in param.opts
        }
        flags |= {
            flag for one in (known, below) if one for p in one.params for flag in p.secondary_opts
        }
        for flag in words[start + 2 :]:
            if flag in ("|", "||", "&&", ";", "done"):
                break
            if re.match(r"--?[a-z]", flag):
                assert flag.split("=")[0] in flags, (command, flag)


def run(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        done = shutil.which("make") and subprocess.run(
            ["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True
        )
        assert not done or done.returncode == 0, done.stderr
        return
    assert words[0] == "llava", f"{command}: mark the block as not run"
    if words[1] not in SLOW:
        done = CliRunner().invoke(app, words[1:], input="")
        assert done.exit_code == 0, (command, done.output, done.exception)


def test_guides_begin_with_a_command_that_runs() -> None:
    guides = re.search(r"- Guides:\n(.*?)  - \w", (ROOT / "mkdocs.yml").read_text(), re.DOTALL)
    assert guides
    for name in re.findall(r": (\S+\.md)", guides[1]):
        if name != "checkpoints.md":  # its subject has to be downloaded
            first = blocks(ROOT / "docs" / name)[0]
            assert first.language in ("sh", "python") and not first.not_run, name


def test_few_blocks_of_the_first_pages_are_not_run() -> None:
    for page in PAGES:
        if page.name in MOSTLY_RUN:
            assert sum(bool(block.not_run) for block in blocks(page)) <= 3, page


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in WRITTEN], ids=lambda path: path.name
)
def test_names_exist(page: Path) -> None:
    """Files, modules and flags in prose; a line is at most 100 columns wide."""
    text = page.read_text("utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for path in re.findall(r"`((?:\w[\w.-]*/)+[\w.-]*\.(?:py|md|html|json|yaml|cpp|h))`", prose):
        if path.split("/")[0] in TOP | {part.name for part in PACKAGE.iterdir()}:
            assert (ROOT / path).exists() or (PACKAGE / path).exists(), path
    for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", prose):
        if name.split(".")[0] in PARTS and not name.endswith(FILES):
            assert resolves(name), name
    flags = {
        flag
        for command in COMMANDS.values()
        for one in (command, *getattr(command, "commands", {}).values())
        for param in one.params
        for flag in (*param.opts, *param.secondary_opts)
    }
    for flag in re.findall(r"`(--[a-z][a-z-]+)", prose):
        assert flag in flags | FOREIGN_FLAGS, flag
    if page.name not in ("recipe.md", "NOTICE.md"):
        for number, line in enumerate(text.splitlines(), 1):
            whole = len(line) <= 100 or line.startswith(("|", "{")) or "http" in line
            assert whole, f"{page.name}:{number} has {len(line)} columns"


TOP = {"bench", "docs", "examples", "recipes", "tests", "deploy", "plugins"}
PARTS = {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py")} - {"__init__"}
FILES = (".py", ".json", ".jsonl", ".toml", ".safetensors", ".html")
FOREIGN_FLAGS = {
    *("--nnodes", "--rdzv-endpoint", "--rdzv-conf", "--local-addr", "--max-restarts"),
    *("--also", "--help", "--version"),
}
"""Of torchrun and of bench/peers.py."""


def resolves(name: str) -> bool:
    """Whether a dotted name below the package is a module, or a name in the text of one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[:count])
        files = list(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        if files and files[0].is_file():
            text = "".join(file.read_text("utf-8") for file in files)
            return all(re.search(rf"\b{rest}\b", text) for rest in parts[count:])
    return False


def test_recipe_keys_are_those_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    hooks = importlib.import_module("hooks")
    assert (ROOT / "docs" / "recipe.md").read_text("utf-8") == hooks.recipe_keys() + "\n", (
        "run `python docs/hooks.py > docs/recipe.md`"
    )


@pytest.mark.parametrize(
    ("results", "page"),
    [("latest", "index"), *((name, name) for name in ("avx2", "amx", "onevision"))],
)
def test_bench_pages_are_those_of_the_template(
    results: str, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stylesheet for all reports: a page is rendered again when it changes."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    source, committed = (ROOT / "docs/bench" / f for f in (f"{results}.json", f"{page}.html"))
    monkeypatch.setattr("sys.argv", ["page.py", str(source), str(tmp_path / page)])
    importlib.import_module("page").main()
    assert (tmp_path / page).read_text("utf-8") == committed.read_text("utf-8"), (
        f"run `python bench/page.py docs/bench/{results}.json docs/bench/{page}.html`"
    )


def test_public_names_have_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    assert not list(importlib.import_module("hooks").undocumented())


def test_the_demo_answers_and_counts(tmp_path: Path) -> None:
    """Questions are command lines to copy, and the follow-up shows how much was cached."""
    tiny = tiny_checkpoint(tmp_path / "tiny")
    done = CliRunner().invoke(app, ["demo", "--folder", "shown", "-m", str(tiny)])
    assert done.exit_code == 0, done.exception
    shown = [line[2:] for line in done.output.splitlines() if line.startswith("$ llava ask")]
    exhibits = demo.exhibits()
    total = sum(len(exhibit.questions) for exhibit in exhibits)
    assert len(shown) == sum(len(exhibit.questions) for exhibit in exhibits if not exhibit.chat)
    assert re.search(rf"^\d+ of {total} right", done.output, re.MULTILINE)
    cached, prompt = map(
        int, re.findall(r"(\d+) of (\d+) prompt tokens were cached", done.output)[0]
    )
    assert 0 < cached < prompt
    copied = CliRunner().invoke(app, [*shlex.split(shown[-1])[1:], "--max-new-tokens", "2"])
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


def test_the_security_page_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "security.md").read_text("utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 40
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text("utf-8"), (file, test)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    tables = text.count("|---|---|---|")
    assert sum("::test_" in row for row in rows) == len(rows) - tables
