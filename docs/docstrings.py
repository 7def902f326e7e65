"""A griffe extension: lines `name: meaning` of a docstring become a list on the site."""

from __future__ import annotations

import re
from typing import Any

import griffe

FIELD = re.compile(r"^(?P<names>\w+(?:, \w+)*|`?\[[^:]*\]`?): (?=\S)")


def fields_as_list(text: str) -> str:
    """`name: meaning` at the beginning of a line, and its continuation lines, as a list item."""
    lines: list[str] = []
    inside = False
    for number, line in enumerate(text.splitlines()):
        match = FIELD.match(line) if number else None
        if match:
            lines += ([] if inside else [""]) + [f"- `{match['names']}`: {line[match.end() :]}"]
            inside = True
        elif inside and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            inside = False
            lines.append(line)
    return "\n".join(lines)


class FieldLists(griffe.Extension):
    """Applies it to every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = fields_as_list(obj.docstring.value)
