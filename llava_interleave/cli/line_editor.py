"""Reading lines at a terminal: history that lasts, completion, several lines. By prompt_toolkit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import license_notice

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document

Values = Callable[[list[str]], Sequence[str]]
"""The values that may come after these words of a command."""
PATHS: Values = lambda _: ()  # noqa: E731
"""Files and folders, in place of a list of values."""


def history_file() -> Path:
    """The lines of earlier conversations; only this user can read it."""
    path = license_notice.state_folder() / "chat_history"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    return path


class LineEditor:
    """Reads at a terminal. commands: what may follow each command, for completion.

    Alt-Enter, or a backslash at the end, begins another line; so does a line break that is pasted.
    """

    def __init__(self, commands: Mapping[str, Values], **session: Any) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings

        keys = KeyBindings()

        @keys.add("escape", "enter")
        def _(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        path = history_file()
        history: History = FileHistory(str(path)) if path.exists() else InMemoryHistory()
        self.session: PromptSession[str] = PromptSession(
            history=history,
            auto_suggest=AutoSuggestFromHistory(),
            completer=completer(commands),
            complete_while_typing=False,
            key_bindings=keys,
            **session,
        )

    def read(self, prompt: str) -> str:
        """A line. Raises EOFError at Ctrl-D; Ctrl-C empties it."""
        while True:
            try:
                return self.session.prompt(prompt)
            except KeyboardInterrupt:
                continue


def completer(commands: Mapping[str, Values]) -> Completer:
    """Completes commands, their paths and values."""
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class CommandCompleter(Completer):
        def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
            text = document.text_before_cursor
            if not text.startswith("/"):
                return
            name, space, rest = text[1:].partition(" ")
            if not space:
                names = [command for command in commands if command.startswith(name)]
                yield from (Completion(command, -len(name)) for command in names)
                return
            if (values := commands.get(name)) is None:
                return
            *before, word = rest.split(" ")
            if values is PATHS:
                yield from paths.get_completions(Document(word, len(word)), event)
                return
            fitting = [value for value in values(before) if value.startswith(word)]
            yield from (Completion(value, -len(word)) for value in fitting)

    return CommandCompleter()
