"""Writes torch_signatures.json: how every release of PyTorch declares what the GPU path calls.

    python tests/helpers/torch_signatures.py torch-2.9.1-*.whl torch-2.10.0-*.whl ...

Wheels of all systems have the same Python files; those for macOS are the smallest: `pip download
torch==2.9.1 --no-deps --platform macosx_11_0_arm64 --python-version 3.12 --only-binary=:all:`.
Functions and classes are read from the modules and stubs of a wheel without importing it, native
operators from `native_functions.yaml`. `test_torch_signatures.py` binds every call against them.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FILE = Path(__file__).parent / "torch_signatures.json"
PACKAGE = ROOT / "llava_interleave"
FILES = (
    *sorted((PACKAGE / "engine").glob("*.py")),
    *sorted((PACKAGE / "model").glob("*.py")),
    *sorted((PACKAGE / "kernels" / "triton").glob("*.py")),
    *sorted((PACKAGE / "distributed").glob("*.py")),
    *(PACKAGE / "quantization" / name for name in ("linear_cuda.py", "replace.py", "packing.py")),
    *(PACKAGE / name for name in ("placement.py", "lora.py", "checkpoints/load.py")),
    *(PACKAGE / "train" / name for name in ("fsdp.py", "loop.py")),
)
"""What a GPU runs, for inference and training."""
STUBS = ("torch/nn/functional.pyi", "torch/_C/_VariableFunctions.pyi", "torch/_C/__init__.pyi")


@dataclass(frozen=True)
class Call:
    """A call: where, of what, with how many positional arguments, and which keywords.

    starred: it has more arguments than can be seen.
    """

    place: str
    name: str
    positional: int
    keywords: tuple[str, ...]
    starred: bool


def calls(path: Path) -> Iterator[Call]:
    """Calls of functions and classes of torch in a file, by their full names."""
    tree = ast.parse(path.read_text("utf-8"))
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    names[alias.asname or "torch"] = alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := _dotted(node.func, names)):
            starred = any(isinstance(arg, ast.Starred) for arg in node.args)
            starred |= any(keyword.arg is None for keyword in node.keywords)
            keywords = tuple(k.arg for k in node.keywords if k.arg is not None)
            place = f"{path.relative_to(ROOT)}:{node.lineno}"
            yield Call(place, name, len(node.args), keywords, starred)


def _dotted(node: ast.expr, names: dict[str, str]) -> str | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in names:
        return None
    return ".".join([names[node.id], *reversed(parts)])


def binds(call: Call, signature: str) -> bool:
    """Whether a signature, as `json` has it, takes the arguments of a call."""
    arguments = _arguments(signature)
    positional = [*arguments.posonlyargs, *arguments.args]
    names = {a.arg for a in (*arguments.args, *arguments.kwonlyargs)}
    if call.positional > len(positional) and arguments.vararg is None:
        return False
    if arguments.kwarg is None and not set(call.keywords) <= names:
        return False
    if call.starred:
        return True
    given = {a.arg for a in positional[: call.positional]} | set(call.keywords)
    required = positional[: len(positional) - len(arguments.defaults)]
    required += [
        a for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is None
    ]
    return all(a.arg in given for a in required)


def _arguments(signature: str) -> ast.arguments:
    function = ast.parse(f"def f({signature}): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function.args


class Wheel:
    """The declarations of one release."""

    def __init__(self, path: Path) -> None:
        self.zip = zipfile.ZipFile(path)
        self.files = set(self.zip.namelist())
        self.version = path.name.split("-")[1].split("+")[0]
        self.trees: dict[str, ast.Module] = {}

    def signatures(self, name: str) -> list[str]:
        """The overloads of a function, or of the constructor of a class."""
        parts = name.split(".")
        for count in range(len(parts) - 1, 0, -1):
            module, rest = "/".join(parts[:count]), parts[count:]
            for file in (f"{module}.py", f"{module}.pyi", f"{module}/__init__.py"):
                if file in self.files and (found := self._find(file, rest)):
                    return found
        for stub in STUBS:  # of native functions
            if found := self._find(stub, parts[-1:]):
                return found
        return []

    def _tree(self, file: str) -> ast.Module:
        if file not in self.trees:
            self.trees[file] = ast.parse(self.zip.read(file))
        return self.trees[file]

    def _find(self, file: str, rest: Sequence[str], depth: int = 0) -> list[str]:
        if file not in self.files or depth > 6:
            return []
        body: list[ast.stmt] = [*self._tree(file).body]
        for node in list(body):  # also what stands under a condition
            if isinstance(node, ast.If | ast.Try):
                body += [*node.body, *node.orelse]
        functions = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == rest[0]]
        if functions and len(rest) == 1:
            overloads = [n for n in functions if _is_overload(n)]
            return [ast.unparse(n.args) for n in overloads or functions[-1:]]
        for node in body:
            if isinstance(node, ast.ClassDef) and node.name == rest[0]:
                return self._method(file, node, rest[1] if len(rest) > 1 else None, depth)
            for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                if alias.name == "*":
                    inside = self._modules(file, node, "")
                    targets = [(target, list(rest)) for target in inside]
                elif (alias.asname or alias.name) == rest[0]:
                    inside = self._modules(file, node, "")
                    targets = [(target, [alias.name, *rest[1:]]) for target in inside]
                    itself = self._modules(file, node, f"/{alias.name}")
                    targets += [(target, list(rest[1:])) for target in itself if rest[1:]]
                else:
                    continue
                for target, names in targets:
                    if found := self._find(target, names, depth + 1):
                        return found
        return []

    def _method(self, file: str, node: ast.ClassDef, name: str | None, depth: int) -> list[str]:
        for wanted in [name] if name else ["__init__", "__new__"]:
            found = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == wanted]
            if found:
                bound = [n for n in found if _is_overload(n)] or found[-1:]
                static = any("staticmethod" in ast.unparse(d) for d in found[0].decorator_list)
                return [_without_self(n.args) if not static else ast.unparse(n.args) for n in bound]
        if name is None and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
            return [
                ", ".join(
                    ast.unparse(n.target) + (f"={ast.unparse(n.value)}" if n.value else "")
                    for n in fields
                )
            ]
        for base in node.bases:
            parts = ast.unparse(base).split(".")
            full = parts if parts[0] == "torch" else None
            rest = [name] if name else []
            found_base = (
                self.signatures(".".join([*full, *rest]))
                if full
                else self._find(file, [*parts, *rest], depth + 1)
            )
            if found_base:
                return found_base
        unknown = "*args, **kwargs" if file.endswith(".pyi") else ""
        return [] if name else [unknown]

    def _modules(self, file: str, node: ast.ImportFrom, name: str) -> list[str]:
        """Files of the module that an import names, or of one inside it."""
        folder = file.split("/")[:-1]
        base = folder[: len(folder) + 1 - node.level] if node.level else []
        module = "/".join([*base, *filter(None, (node.module or "").split("."))])
        suffixes = (".py", ".pyi", "/__init__.py", "/__init__.pyi")
        files = (f"{module}{name}{suffix}" for suffix in suffixes)
        return [one for one in files if one in self.files and one != file]


def _is_overload(node: ast.FunctionDef) -> bool:
    return any("overload" in ast.unparse(d) for d in node.decorator_list)


def _without_self(arguments: ast.arguments) -> str:
    (arguments.posonlyargs or arguments.args).pop(0)
    text = ast.unparse(arguments)
    (arguments.posonlyargs or arguments.args).insert(0, ast.arg("self"))
    return text


def compact(signature: str) -> str:
    """A signature without annotations, and with `0` for every default."""
    arguments = _arguments(signature)
    for one in (
        *(*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs),
        *(arguments.vararg, arguments.kwarg),
    ):
        if one is not None:
            one.annotation = None
    zero = ast.Constant(0)
    arguments.defaults = [zero for _ in arguments.defaults]
    arguments.kw_defaults = [d and zero for d in arguments.kw_defaults]
    return ast.unparse(arguments)


def main() -> None:
    wanted = sorted({call.name for path in FILES for call in calls(path)})
    wheels = sorted(map(Wheel, map(Path, sys.argv[1:])), key=lambda w: _number(w.version))
    found: dict[str, dict[str, list[str]]] = {}
    for name in wanted:
        for wheel in wheels:
            each = sorted({compact(signature) for signature in wheel.signatures(name)})
            found.setdefault(name, {}).setdefault(json.dumps(each), []).append(wheel.version)
    versions = json.dumps([wheel.version for wheel in wheels])
    lines = (
        f"  {json.dumps(name)}: "
        + json.dumps([[versions, json.loads(each)] for each, versions in kinds.items()])
        for name, kinds in found.items()
    )
    text = f'{{"versions": {versions}, "signatures": {{\n' + ",\n".join(lines) + "\n}}\n"
    FILE.write_text(text, "utf-8")


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


if __name__ == "__main__":
    main()
