"""The Jinja environment of chat templates: a sandbox bounded in time and size.

Source of its options, `raise_exception`, `strftime_now`, `tojson` and the `generation` tag:
transformers `utils/chat_template_utils.py`. Imported when a template is rendered, as jinja2 is.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDERED = 20_000_000
"""Characters of the text that a template renders or builds on the way."""
MAX_WIDTH = 10_000
"""Largest number that a string method or a filter takes for a width or a count."""
SECONDS = 10.0
"""Wall-clock seconds of one rendering."""


class _Generation(Extension):
    """`{% generation %}`: the block as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """Bounded in time from `begin` on, and in the size of its texts. Raises jinja2's
    `SecurityError`.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._local = threading.local()

    def begin(self) -> None:
        self._local.end = time.monotonic() + SECONDS

    def check(self, size: int = 0) -> str:
        if time.monotonic() > self._local.end:
            raise SecurityError(f"it takes longer than {SECONDS:g} s")
        if size > MAX_RENDERED:
            raise SecurityError(f"it makes more than {MAX_RENDERED:,} characters")
        return ""

    def join(self, *parts: Any) -> str:
        texts = [str(part) for part in parts]
        self.check(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(x) if hasattr(x, "__len__") else 0 for x in (left, right)]
        if operator == "+":
            self.check(sum(sizes))
        elif any(sizes) and operator == "*":
            count = right if isinstance(right, int) else left
            self.check(max(sizes) * max(int(count), 0) if isinstance(count, int) else 0)
        elif any(sizes) or not all(abs(x) <= 2**64 for x in (left, right)):
            raise SecurityError(f"it uses {operator!r} on texts or large numbers")
        elif operator == "**" and abs(right) > 64:
            raise SecurityError("it uses powers above 64")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(function, "__self__", None), str | list | tuple):
            _check_widths((*args, *kwargs.values()))
        return super().call(context, function, *args, **kwargs)


def _check_widths(values: Sequence[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > MAX_WIDTH for value in values):
        raise SecurityError(f"it uses a width above {MAX_WIDTH:,}")


def _bounded(inner: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses large widths and counts."""

    @functools.wraps(inner)  # it keeps jinja's mark of what is passed first
    def outer(*args: Any, **kwargs: Any) -> Any:
        _check_widths((*args, *kwargs.values()))
        return inner(*args, **kwargs)

    return outer


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    _check_widths((indent,))
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def environment() -> Sandbox:
    """A new environment as transformers', bounded."""
    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    for name in ("center", "format", "batch", "slice", "indent", "wordwrap", "truncate", "round"):
        made.filters[name] = _bounded(made.filters[name])
    made.filters["tojson"] = _tojson
    del made.globals["lipsum"]
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made
