"""Hooks of `mkdocs build`: every public name of python-api.md has a docstring.

`python docs/hooks.py > docs/recipe.md` writes the page of recipe keys from the fields of `Recipe`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "python-api.md"
log = logging.getLogger("mkdocs.hooks.docstrings")


def undocumented(page: Path = PAGE) -> Iterator[str]:
    """The names that the page's `:::` lines show, members included, without a docstring."""
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text("utf-8"), re.MULTILINE):
        module, _, last = name.rpartition(".")
        thing = getattr(importlib.import_module(module), last, None)
        thing = thing or importlib.import_module(name)
        if not inspect.getdoc(thing):
            yield name
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            function = value.fget if isinstance(value, property) else value
            function = getattr(function, "__func__", function)
            if not member.startswith("_") and inspect.isfunction(function) and not function.__doc__:
                yield f"{name}.{member}"


def on_pre_build(**_: object) -> None:
    """Warn of what has no docstring; under --strict a warning ends the build."""
    for name in undocumented():
        log.warning("%s is public and has no docstring", name)


def recipe_keys() -> str:
    """docs/recipe.md: every key with its default and meaning."""
    from llava_interleave.train import recipe

    def table(record: type[Any]) -> str:
        rows = ["| key | default | meaning |", "|---|---|---|"]
        for field in dataclasses.fields(record):
            if field.name not in recipe.TABLES:
                rows.append(f"| `{field.name}` | {_value(field.default)} | {_meaning(field)} |")
        return "\n".join(rows) + "\n"

    parts = [
        "# Recipe keys\n",
        "<!-- Written by `python docs/hooks.py > docs/recipe.md`; a test compares. -->\n",
        "The settings of [`llava train`](training.md), as keys of a TOML file. Each is a flag too:",
        "`lr` is `--lr`, `rank` of `[adapter]` is `--adapter-rank`. A flag replaces the key.\n",
        table(recipe.Recipe),
    ]
    for name, record in recipe.TABLES.items():
        parts += [f"## `[{name}]`\n", f"{inspect.getdoc(record)}\n", table(record)]
    shipped = ", ".join(f"`{name}`" for name in recipe.SHIPPED)
    parts.append(f"Recipes in the package, for `-r`: {shipped}.")
    return "\n".join(parts)


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{item}"' for item in value) + "]`"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f'`"{text}"`' if isinstance(value, str) else f"`{text}`"


def _meaning(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata["help"]).replace("|", "\\|")


if __name__ == "__main__":
    print(recipe_keys())
