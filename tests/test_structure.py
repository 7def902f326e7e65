"""The floors of docs/architecture.md, held to: who may import whom, and what costs nothing to
import.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import llava_interleave
from llava_interleave.cli import MODULES as MODULES_OF_COMMANDS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llava_interleave"
MODULES = sorted(PACKAGE.rglob("*.py"))
DIAGRAM = (ROOT / "docs" / "architecture.md").read_text("utf-8")
TREES = {path: ast.parse(path.read_text("utf-8")) for path in MODULES}
"""Parsed before any test runs: Playwright's greenlets confuse the parser of Python 3.11."""
FLOORS = {
    part: int(line.split()[0])
    for line in DIAGRAM.split("```")[1].splitlines()
    if re.match(r"\d+ ", line)
    for part in line.split()[1:]
}
NEVER = {
    part: re.findall(r"`(\w+)`", never)
    for part, never in re.findall(r"^\| `(\w+)/?` \|.*\| *(.*?) *\|$", DIAGRAM, re.MULTILINE)
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a file imports, wherever in it: in functions and for
    type checkers too.
    """
    within = ["llava_interleave", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = within[: len(within) + 1 - node.level] if node.level else []
            start = [*base, *(node.module.split(".") if node.module else [])]
            yield from ((node.lineno, ".".join([*start, alias.name])) for alias in node.names)


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_the_diagram_shows_every_part() -> None:
    parts = {part_of(path) for path in MODULES} - {"__init__", "__main__"}
    assert set(FLOORS) == parts
    assert set(NEVER) == parts


@pytest.mark.parametrize(
    "path", [path for path in MODULES if part_of(path) not in ("__init__", "__main__")], ids=name
)
def test_imports_go_down(path: Path) -> None:
    part = part_of(path)
    for line, imported in imports(path):
        top, _, rest = imported.partition(".")
        other = rest.split(".")[0] if top == "llava_interleave" else top
        assert other not in NEVER[part], f"{path}:{line}: {part} never imports {other}"
        if top == "llava_interleave" and other not in (part, "__version__"):
            assert FLOORS[other] < FLOORS[part], f"{path}:{line}: {part} is not above {other}"


def test_forbidden_imports() -> None:
    """transformers is an oracle and a base class of `hf`, torchvision a second image library,
    pickle runs code from files; recipes/ is not in the wheel.
    """
    for path in MODULES:
        for line, imported in imports(path):
            top = imported.split(".")[0]
            assert top not in ("pickle", "torchvision", "recipes"), f"{path}:{line}"
            assert top != "transformers" or part_of(path) in ("verify", "hf"), f"{path}:{line}"


def test_no_test_file_imports_another() -> None:
    """What several of them need is in tests/helpers."""
    for path in (ROOT / "tests").rglob("*.py"):
        for line in re.findall(
            r"^(?:from|import) tests\.(?!helpers).*", path.read_text("utf-8"), re.M
        ):
            raise AssertionError(f"{path}: {line}")


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_modules_say_what_they_are(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), f"{path} has no docstring"
    assert not {"utils", "misc", "helpers", "common"} & set(
        path.relative_to(PACKAGE).with_suffix("").parts
    )


@pytest.mark.parametrize(
    "statement",
    [
        "import llava_interleave; llava_interleave.LlavaError",
        "from llava_interleave import license_notice, options, config, image_layout, errors",
        "from llava_interleave import journal, batch; from llava_interleave.evals import interleave, multiple_choice, report",
        "sys.argv = ['llava', '--help']; from llava_interleave.cli import main; main()",
    ],
)
def test_no_torch_without_need(statement: str) -> None:
    code = (
        f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {statement}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("False\n")


def test_a_command_imports_no_other() -> None:
    code = "import sys; from llava_interleave.cli import app; app(['ask', '--help'], 'llava', standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--attribution" in done.stdout, done.stderr
    commands = {f"llava_interleave.cli.{name}" for name in MODULES_OF_COMMANDS}
    assert commands.intersection(done.stdout.split()) == {"llava_interleave.cli.ask"}


def test_the_changelog_has_this_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(rf"^## {re.escape(llava_interleave.__version__)}\b", changes, re.MULTILINE)


def test_the_conda_recipe_requires_what_the_package_requires() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    other_names = {"torch": "pytorch"}
    wanted = {f"python {project['requires-python']}"}
    for requirement in project["dependencies"]:
        name, version = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()
        wanted.add(f"{other_names.get(name, name)} {version}")
    recipe = yaml.safe_load(
        re.sub(r"\$\{\{.*?\}\}", "0", (ROOT / "deploy/conda/recipe.yaml").read_text("utf-8"))
    )
    found = {one.replace("_", "-") for one in recipe["requirements"]["run"]}
    assert found == wanted
    assert recipe["context"]["version"] == llava_interleave.__version__
