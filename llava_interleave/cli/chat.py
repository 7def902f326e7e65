"""`llava chat`: a conversation in the terminal."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import LlavaError, OptionError
from ..options import Options
from . import flags, terminal
from .local_model import ModelFlags

if TYPE_CHECKING:
    from ..chat import Conversation

HELP = """\
/attach FILE...  attach images, videos or folders of them to the next question
/files           list the attachments
/undo            remove the last question and answer; its images are attached again
/info            the model, its device and precision
/new             start a new conversation
/save [FILE]     save the conversation and its KV cache; /embed [FILE] also stores the images
/load FILE       continue a saved conversation
/quit            leave (or Ctrl-D)
A line that ends in \\ continues on the next one. Ctrl-C stops an answer."""


def register(app: typer.Typer) -> None:
    app.command("chat")(flags.with_options(chat))


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
    model: flags.ModelName = None,
    revision: flags.Revision = None,
    precision: flags.Precision = "auto",
    device: flags.Device = "auto",
    kv_precision: flags.KvPrecision = "auto",
    limit: flags.Limit = None,
    generation_config: flags.GenerationConfig = "auto",
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
    bot = ModelFlags(
        model,
        revision,
        precision,
        device,
        options.adapter,
        limits=tuple(limit or ()),
        generation_config=generation_config,
        kv_precision=kv_precision,
    ).load()
    session = Terminal(bot.conversation(), bot.options(changes=given), kv)
    if resume:
        session.load([str(resume)])
    session.conversation.attach(*flags.attachments(files, None, frames_of))
    session.files([])
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
            "files": self.files,
            "undo": self.undo,
            "info": self.info,
            "new": self.new,
            "save": self.save,
            "embed": self.embed,
            "load": self.load,
            "help": self.help,
        }

    def run(self) -> None:
        if sys.stdin.isatty():
            import readline  # noqa: F401  (gives input() line editing and history)

            self.status("/help lists the commands")
        while (line := self.read()) not in (None, "/quit"):
            try:
                if line.startswith("/"):
                    self.command(line[1:])
                elif line:
                    self.answer(line)
            except LlavaError as error:
                self.status(f"llava: {flags.describe(error)}")

    def read(self) -> str | None:
        """The next line, joined with the one after a final backslash; None at the end of input."""
        lines: list[str] = []
        while True:
            try:
                line = input(
                    ("  " if lines else "> ") if sys.stdin.isatty() and sys.stdout.isatty() else ""
                )
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
        chunks = None
        try:
            with terminal.spinner("encoding the prompt") as progress:
                chunks = self.conversation.stream(question, self.options, progress=progress)
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

    def files(self, _: list[str]) -> None:
        for part in self.conversation.pending:
            self.status(f"{part['type']}: {part.get('path') or part.get('url', '(embedded)')[:80]}")

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
