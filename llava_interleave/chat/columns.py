"""Columns of a table over images: a question with the type of its answers."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import OptionError

Value = str | int | float | bool
TYPES: dict[str, type] = {"text": str, "int": int, "float": float, "bool": bool}
"""Types by their name on the command line and over HTTP."""
FORM = re.compile(r"\s*([^\s:]+)(?:\s+([^:]+?))?\s*:\s*(\S.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Column:
    """A question about each image.

    choices: the only answers of a text column; empty for free text, which is one line.
    """

    name: str
    question: str
    type: type = str
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what in ("name", "question"):
            text = getattr(self, what)
            if not isinstance(text, str) or not text.strip():
                raise OptionError(f"a column's {what} is a non-empty text, not {text!r}")
        if self.type not in TYPES.values():
            raise OptionError(
                f"column {self.name!r} has the type {self.type!r}; the types are str, int, float, "
                "bool and Literal of texts"
            )
        if len(set(self.choices)) < len(self.choices) or not all(
            isinstance(choice, str) and choice.strip() for choice in self.choices
        ):
            raise OptionError(
                f"the choices of column {self.name!r} are different, non-empty texts, "
                f"not {list(self.choices)!r}"
            )

    @property
    def response_format(self) -> dict[str, Any] | None:
        """What limits an answer; None for free text."""
        if self.choices:
            return {"type": "choice", "choice": list(self.choices)}
        if self.type is bool:  # models differ in the case that they were trained on
            return {"type": "choice", "choice": ["Yes", "No", "yes", "no"]}
        if self.type is int:
            return {"type": "regex", "regex": "-?[0-9]{1,15}"}
        if self.type is float:
            return {"type": "regex", "regex": r"-?[0-9]{1,15}(\.[0-9]{1,15})?"}
        return None

    def parse(self, text: str) -> Value:
        """The value of an answer's text."""
        if self.type is bool:
            return text.lower() == "yes"
        return text if self.type is str else self.type(text)

    @classmethod
    def from_text(cls, text: str) -> Column:
        """A column of the command line: `NAME [TYPE]: QUESTION`.

        TYPE is text, int, float, bool, or choices as `indoors|outdoors`.
        """
        match = FORM.fullmatch(text)
        if match is None:
            raise OptionError(
                f"a column is 'NAME [TYPE]: QUESTION', for example 'people int: How many people "
                f"are there?', not {text!r}"
            )
        return cls.from_type(match[1], match[3], match[2] or "text")

    @classmethod
    def from_type(cls, name: str, question: str, kind: str) -> Column:
        """A column whose type is given by name, or as choices separated by bars."""
        if "|" in kind:
            return cls(name, question, str, tuple(choice.strip() for choice in kind.split("|")))
        if kind not in TYPES:
            raise OptionError(
                f"column {name!r} has the type {kind!r}; the types are {', '.join(TYPES)}, and "
                "choices such as 'indoors|outdoors'"
            )
        return cls(name, question, TYPES[kind])


def read_columns(columns: Mapping[str, Any] | Sequence[Column] | type) -> tuple[Column, ...]:
    """Columns as `Chatbot.each` takes them.

    A mapping of names to questions or pairs (question, type), columns, or a pydantic model whose
    fields have a description, which is the question. Raises `OptionError`.
    """
    if isinstance(columns, Mapping):
        pairs = {name: (one, str) if isinstance(one, str) else one for name, one in columns.items()}
        wrong = [name for name, one in pairs.items() if len(one) != 2]
        if wrong:
            raise OptionError(
                f"column {wrong[0]!r} is a question or a pair (question, type), "
                f"not {columns[wrong[0]]!r}"
            )
        found = tuple(_column(name, *pair) for name, pair in pairs.items())
    elif isinstance(columns, type):
        fields = getattr(columns, "model_fields", None)
        if fields is None:
            raise OptionError(f"{columns.__name__} is not a pydantic model")
        found = tuple(
            _column(name, field.description or "", field.annotation)
            for name, field in fields.items()
        )
    else:
        found = tuple(columns)
    names = [column.name for column in found]
    if not found or len(set(names)) < len(names):
        raise OptionError(f"a table has columns with different names, not {names}")
    return found


def _column(name: str, question: str, kind: Any) -> Column:
    if typing.get_origin(kind) is Literal:
        return Column(name, question, str, typing.get_args(kind))
    if not isinstance(kind, type) or isinstance(kind, types.GenericAlias):
        raise OptionError(
            f"column {name!r} has the type {kind!r}; the types are str, int, float, bool and "
            "Literal of texts"
        )
    return Column(name, question, kind)
