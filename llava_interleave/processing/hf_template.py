"""The chat template of a checkpoint's folder: Jinja in a sandbox, bounded in time and size.

Source of the environment (options, `raise_exception`, `strftime_now`, `tojson`, the `generation`
tag): transformers `utils/chat_template_utils.py`.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config_json import read_json
from ..errors import CheckpointError, PromptError

if TYPE_CHECKING:
    from jinja2 import Template

MAX_SOURCE = 1_000_000
MAX_RENDERED = 20_000_000
"""Characters of a template, and of the text that it renders or builds on the way."""
MAX_WIDTH = 10_000
"""Largest number that a string method or a filter takes for a width or a count."""
SECONDS = 10.0
"""Wall-clock seconds of one rendering."""
FAMILY = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% for part in message.content if part.type == 'image' %}<image>{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ '\\n' + part.text }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template of this family: images, then texts, each after a newline."""


@dataclass(frozen=True)
class HfTemplate:
    """A chat template and the special tokens that it may name."""

    source: str = FAMILY
    tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path) -> HfTemplate:
        """chat_template.jinja, else chat_template.json, else that of tokenizer_config.json.

        Of several named templates the default one is taken. Raises CheckpointError.
        """
        config = read_json(folder / "tokenizer_config.json", optional=True)
        source: Any = None
        if (path := folder / "chat_template.jinja").is_file():
            try:
                source = path.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{path} cannot be read") from error
        for settings in (read_json(folder / "chat_template.json", optional=True), config):
            source = settings.get("chat_template") if source is None else source
        if isinstance(source, list):
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, Mapping)}
            source = named.get("default")
        if source is None:
            return cls()
        if not isinstance(source, str) or len(source) > MAX_SOURCE:
            raise CheckpointError(
                f"the chat template of {folder} must be a text of at most {MAX_SOURCE:,} characters"
            )
        tokens = {}
        for name, token in config.items():
            text = token.get("content") if isinstance(token, Mapping) else token
            if name.endswith("_token") and isinstance(text, str):
                tokens[name] = text
        return cls(source, tokens)

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template loops over the parts of a message; else its content is a text."""
        from jinja2 import nodes

        return any(
            getattr(access, "attr", getattr(access, "name", None)) == "content"
            or getattr(getattr(access, "arg", None), "value", None) == "content"
            for loop in self._tree.find_all(nodes.For)
            for access in (loop.iter, *loop.iter.find_all((nodes.Getattr, nodes.Getitem)))
        )

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The text of messages. Raises PromptError where the template refuses them."""
        environment = self._template.environment
        environment.begin()  # type: ignore[attr-defined]
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                **self.tokens,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            ):
                size += len(piece)
                environment.check(size)  # type: ignore[attr-defined]
                pieces.append(piece)
        except Exception as error:  # a template may raise anything
            reason = re.sub(r"\s+", " ", str(error))[:300]
            raise PromptError(
                f"the checkpoint's chat template does not take these messages: {reason}; "
                "use preset interleave"
            ) from error
        return "".join(pieces)

    @cached_property
    def _tree(self) -> Any:
        try:
            return _environment().parse(self.source)
        except Exception as error:  # TemplateSyntaxError, and RecursionError of nested expressions
            raise CheckpointError(
                f"the chat template of the checkpoint cannot be read: {error}"
            ) from error

    @cached_property
    def _template(self) -> Template:
        from jinja2 import nodes

        environment = _environment()
        tree = self._tree
        for body in [loop.body for loop in tree.find_all((nodes.For, nodes.Macro))]:
            tick = nodes.Call(nodes.EnvironmentAttribute("check"), [], [], None, None)
            body.insert(0, nodes.ExprStmt(tick, lineno=1))
        for concat in list(tree.find_all(nodes.Concat)):
            joined = nodes.EnvironmentAttribute("join")
            concat.nodes = [nodes.Call(joined, concat.nodes, [], None, None)]
        tree.set_environment(environment)
        try:
            return environment.from_string(tree)
        except Exception as error:  # TemplateSyntaxError, and RecursionError of nested expressions
            raise CheckpointError(
                f"the chat template of the checkpoint cannot be read: {error}"
            ) from error


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: the block as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Bounded(ImmutableSandboxedEnvironment):
        """A sandbox whose loops end in time, and whose texts stay small."""

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

    def bounded(name: str) -> Any:
        inner = environment.filters[name]

        def outer(*args: Any, **kwargs: Any) -> Any:
            _check_widths((*args, *kwargs.values()))
            return inner(*args, **kwargs)

        for mark in ("jinja_pass_arg",):
            if hasattr(inner, mark):
                setattr(outer, mark, getattr(inner, mark))
        return outer

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
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

    environment = Bounded(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    for name in ("center", "format", "batch", "slice", "indent", "wordwrap", "truncate", "round"):
        environment.filters[name] = bounded(name)
    environment.filters["tojson"] = tojson
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
