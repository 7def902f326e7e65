"""`llava chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import LlavaError, OptionError
from ..options import Options, unknown
from . import flags, terminal
from .line_editor import PATHS, LineEditor, Values
from .local_model import BUILTIN_MODEL, ModelFlags, with_model

if TYPE_CHECKING:
    from ..chat import AnswerDelta, Conversation

HELP = """\
/attach FILE...  attach images, videos or folders of them to the next question; *.png works
/detach [N...]   remove attachments of the next question, by their numbers or all
/files           list the images of the conversation and of the next question
/retry           answer the last question again
/undo            remove the last question and answer; its images are attached again
/set NAME VALUE  change an option: /set temperature 0.7; /set lists them
/system [TEXT]   the system prompt from now on: a text, none or default
/info            the model, its device and precision
/new             start a new conversation
/save [FILE]     save the conversation and its KV cache; /embed [FILE] also stores the images
/load FILE       continue a saved conversation
/help            this list
/quit            leave (or Ctrl-D)
A line that ends in \\, or Alt-Enter, continues on the next one. Tab completes commands, paths and
values. Ctrl-C stops an answer."""
PRESETS = ("interleave", "hf", "official")
NOT_IN_CHAT = ("n", "logprobs", "logit_bias", "stop_ids", "adapter", "system")
"""Options that /set does not have."""


def register(app: typer.Typer) -> None:
    command = with_model("kv_precision", "limits", "generation_config")(chat)
    app.command("chat")(flags.with_options(command))


def chat(
    files: flags.Files = None,
    attach: flags.Attach = None,
    frames_of: flags.FramesOf = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Continue a saved conversation; /save writes it to the same file."),
    ] = None,
    kv: Annotated[
        bool,
        typer.Option(
            help="Save the KV cache with a conversation, which then continues without a prefill."
        ),
    ] = True,
    model: ModelFlags = BUILTIN_MODEL,
    *,
    given: dict[str, Any],
) -> None:
    """Talk about images and videos; attach more at any time. /help lists the commands."""
    options = Options(**given)
    files = [*(attach or []), *(files or [])]
    if "-" in files:
        raise OptionError("standard input is the conversation; attach a file instead of '-'")
    if options.n != 1:
        raise OptionError(f"a conversation continues with one answer, not n = {options.n}")
    if options.logprobs is not None:
        raise OptionError("--logprobs are reported by llava ask --json")
    bot = model.with_adapter(options.adapter).load()
    session = Terminal(bot.conversation(), bot.options(changes=given), kv)
    if resume:
        session.load([str(resume)])
    session.conversation.attach(*flags.attachments(files, None, frames_of))
    session.greet()
    session.run()


class Terminal:
    """Reads lines, runs commands, prints answers to stdout and everything else to stderr."""

    def __init__(self, conversation: Conversation, options: Options, kv: bool) -> None:
        self.conversation = conversation
        self.options = options
        self.kv = kv
        self.file: Path | None = None
        self.commands = {
            "attach": self.attach,
            "detach": self.detach,
            "files": self.files,
            "retry": self.retry,
            "undo": self.undo,
            "set": self.set,
            "system": self.system,
            "info": self.info,
            "new": self.new,
            "save": self.save,
            "embed": self.embed,
            "load": self.load,
            "help": self.help,
        }
        self.editor: LineEditor | None = None

    def greet(self) -> None:
        """The model and what is attached; at a terminal the commands as well."""
        if sys.stdin.isatty() and sys.stdout.isatty():
            info = self.conversation.bot.info()
            millions = self.conversation.bot.model.config.num_parameters / 1e6
            self.status(
                f"{self.conversation.bot.source.name}: {millions:,.0f} M parameters, "
                f"{info['precision']}, on {info['device']}; context {info['context']:,} tokens"
            )
            commands = " ".join(f"/{name}" for name in self.commands)
            self.status(f"{commands} /quit\nAsk a question; /help explains the commands.")
            if not self.conversation.pending:
                self.status("nothing is attached: /attach FILE...")
        self.files([])

    def run(self) -> None:
        if sys.stdin.isatty() and sys.stdout.isatty():
            self.editor = LineEditor(self.completions())
        while (line := self.read()) not in (None, "/quit"):
            try:
                if line.startswith("/"):
                    self.command(line[1:])
                elif line:
                    self.answer(line)
            except LlavaError as error:
                self.status(f"llava: {flags.describe(error)}")

    def completions(self) -> dict[str, Values]:
        """What may follow each command."""
        paths = dict.fromkeys(("attach", "save", "embed", "load"), PATHS)
        values = {"set": self._set_values, "system": lambda _: ("none", "default")}
        return {name: lambda _: () for name in (*self.commands, "quit")} | paths | values

    def read(self) -> str | None:
        """The next line, joined with the one after a final backslash; None at the end of input."""
        lines: list[str] = []
        while True:
            try:
                prompt = "  " if lines else "> "
                line = self.editor.read(prompt) if self.editor else input()
            except EOFError:
                return "\n".join(lines).strip() if lines else None
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                return "\n".join(lines).strip()

    def command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            raise OptionError(f"unknown command /{name}; /help lists the commands")
        try:
            words = shlex.split(rest)
        except ValueError as error:
            raise OptionError(f"/{line}: {error}") from error
        self.commands[name](words)

    def answer(self, question: str) -> None:
        """Print the answer to a question."""
        self.show(lambda **named: self.conversation.stream(question, self.options, **named))

    def show(self, stream: Callable[..., Generator[AnswerDelta]]) -> None:
        """Print an answer as it is generated; Ctrl-C stops it."""
        chunks = None
        try:
            with terminal.spinner("encoding the prompt") as progress:
                chunks = stream(progress=progress)
                if self.options.cite:  # the numbers are known at the end
                    text = "".join(one.answer.cited for one in chunks if one.answer is not None)
                else:
                    text = next((chunk.text for chunk in chunks if chunk.text), "")
            print(text, end="", flush=True)
            for chunk in chunks:
                print(chunk.text, end="", flush=True)
        except KeyboardInterrupt:
            if chunks is not None:
                chunks.close()
            self.status("\nstopped; the question and its answer are not part of the conversation")
            return
        print(flush=True)

    def attach(self, words: list[str]) -> None:
        self.conversation.attach(*flags.expand(words))
        self.files([])

    def detach(self, words: list[str]) -> None:
        """Remove pending attachments by their numbers in `files`; all without numbers."""
        pending = self.conversation.pending
        numbers = {int(word) for word in words if word.isdecimal()}
        if len(numbers) < len(words) or not numbers <= set(range(1, len(pending) + 1)):
            raise OptionError(f"/detach takes numbers from 1 to {len(pending)}; /files shows them")
        keep = numbers and [p for i, p in enumerate(pending, 1) if i not in numbers]
        self.conversation.pending = list(keep or ())
        self.files([])

    def files(self, _: list[str]) -> None:
        """The media of the conversation in order, and those of the next question."""
        sent = [part for turn in self.conversation.messages for part in media_of(turn)]
        for number, part in enumerate(sent, 1):
            self.status(f"sent {number}. {describe_part(part)}")
        for number, part in enumerate(self.conversation.pending, 1):
            self.status(f"{number}. {describe_part(part)}")

    def retry(self, _: list[str]) -> None:
        """Answer the last question again, with the options of now."""
        self.show(lambda **named: self.conversation.retry(self.options, **named))

    def set(self, words: list[str]) -> None:
        """List the options, or change one."""
        names = self._set_values([])
        if not words:
            for name in names:
                self.status(f"{name} = {getattr(self.options, name)}")
            return
        name, value = words[0], " ".join(words[1:])
        if name not in names:
            raise unknown("option", name, names)
        if not value:
            raise OptionError(f"/set {name} needs a value; it is {getattr(self.options, name)}")
        self.options = self.options.but({name: _parsed(value)})
        self.status(f"{name} = {getattr(self.options, name)}")

    def _set_values(self, before: list[str]) -> tuple[str, ...]:
        """The names of options, or the values of the named one."""
        names = [field.name for field in dataclasses.fields(Options)]
        if not before:
            return tuple(name for name in names if name not in NOT_IN_CHAT)
        value = getattr(self.options, before[0], None)
        if before[0] == "preset":
            return PRESETS
        return ("true", "false") if isinstance(value, bool) else ("none",)

    def system(self, words: list[str]) -> None:
        """Show or change the system prompt."""
        if words:
            text = " ".join(words)
            self.options = self.options.but({"system": "" if text == "none" else text})
        self.status(f"system prompt: {self.options.system or 'none'}")

    def undo(self, _: list[str]) -> None:
        self.status("removed" if self.conversation.undo() else "there is nothing to undo")

    def info(self, _: list[str]) -> None:
        for name, value in self.conversation.bot.info().items():
            self.status(f"{name}: {value}")

    def new(self, _: list[str]) -> None:
        self.conversation = self.conversation.bot.conversation()

    def save(self, words: list[str], embed: bool = False) -> None:
        self.file = Path(words[0]) if words else self.file
        if self.file is None:
            raise OptionError("give a file name: /save chat.json")
        with terminal.spinner("saving"):
            size = self.conversation.save(self.file, embed=embed, kv=self.kv)
        self.status(f"saved {self.file}" + f" and {size / 1e6:,.1f} MB of KV cache" * bool(size))

    def embed(self, words: list[str]) -> None:
        self.save(words, embed=True)

    def load(self, words: list[str]) -> None:
        if len(words) != 1:
            raise OptionError("give one file name: /load chat.json")
        self.conversation, self.file = (
            self.conversation.bot.resume(words[0], kv=False),
            Path(words[0]),
        )
        self.status(f"{len(self.conversation.messages)} messages")
        try:
            with terminal.spinner("reading the KV cache"):
                cached = self.conversation.load_kv(self.file) if self.kv else 0
        except LlavaError as error:
            self.status(
                f"could not restore the KV cache ({error}); the conversation is prefilled again"
            )
        else:
            if cached:
                self.status(f"{cached:,} tokens restored from the KV cache")

    def help(self, _: list[str]) -> None:
        self.status(HELP)

    def status(self, text: str) -> None:
        print(text, file=sys.stderr)


def media_of(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """The images, videos and views of a message."""
    content = turn["content"]
    return [] if isinstance(content, str) else [p for p in content if p["type"] != "text"]


def describe_part(part: Mapping[str, Any]) -> str:
    """An attachment in a line."""
    return f"{part['type']}: {str(part.get('path') or part.get('url', '(embedded)'))[:80]}"


def _parsed(text: str) -> object:
    """A value of /set."""
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
