"""The chat template of a checkpoint's folder: Jinja in a sandbox, bounded in time and size.

The sandbox is in `template_sandbox`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config_json import read_json
from ..errors import CheckpointError, PromptError

if TYPE_CHECKING:
    from jinja2 import Template

MAX_SOURCE = 1_000_000
"""Characters of a template."""
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

    @cached_property
    def has_videos(self) -> bool:
        """Whether the template writes `<video>` for a video; else it is rendered as an image."""
        if not self.takes_parts:
            return False
        try:
            return "<video>" in self.render(
                [{"role": "user", "content": [{"type": "video"}]}], add_generation_prompt=False
            )
        except PromptError:
            return False

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
            from .template_sandbox import environment

            return environment().parse(self.source)
        except Exception as error:  # TemplateSyntaxError, and RecursionError of nested expressions
            raise CheckpointError(
                f"the chat template of the checkpoint cannot be read: {error}"
            ) from error

    @cached_property
    def _template(self) -> Template:
        from jinja2 import nodes

        from .template_sandbox import environment

        tree = self._tree
        for body in [loop.body for loop in tree.find_all((nodes.For, nodes.Macro))]:
            tick = nodes.Call(nodes.EnvironmentAttribute("check"), [], [], None, None)
            body.insert(0, nodes.ExprStmt(tick, lineno=1))
        for concat in list(tree.find_all(nodes.Concat)):
            joined = nodes.EnvironmentAttribute("join")
            concat.nodes = [nodes.Call(joined, concat.nodes, [], None, None)]
        sandbox = environment()
        tree.set_environment(sandbox)
        try:
            return sandbox.from_string(tree)
        except Exception as error:  # TemplateSyntaxError, and RecursionError of nested expressions
            raise CheckpointError(
                f"the chat template of the checkpoint cannot be read: {error}"
            ) from error
