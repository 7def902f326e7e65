"""`llava chat`: a conversation in the terminal."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import LlavaError, OptionError
from ..options import Options
from . import terminal

if TYPE_CHECKING:
    from ..chat import Conversation

HELP = """\
/attach FILE...  attach pictures, videos or folders of frames to the next question
/files           what is attached
/undo            take back the last question and answer; its pictures are attached again
/info            the model and where it runs
/new             begin a new conversation
/save [FILE]     save the conversation, and beside it what was computed, to go on at once;
                 /embed [FILE] stores the pictures inside
/load FILE       go on with a saved conversation
/quit            leave (or Ctrl-D)
A line that ends in \\ goes on in the next one. Ctrl-C breaks an answer off."""


def register(app: typer.Typer) -> None:
    app.command("chat")(terminal.with_options(chat))


def chat(
    attach: terminal.Attach = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with a saved conversation; /save writes it there again."),
    ] = None,
    kv: Annotated[
        bool,
        typer.Option(
            help="Keep keys and values beside a saved conversation, which then goes on without being read again."
        ),
    ] = True,
    model: terminal.ModelName = None,
    revision: terminal.Revision = None,
    precision: terminal.Precision = "auto",
    device: terminal.Device = "auto",
    *,
    options: Options,
) -> None:
    """Talk about pictures and videos; attach more at any time. /help tells the commands."""
    if "-" in (attach or []):
        raise OptionError("standard input is the conversation here; attach a file")
    if options.n != 1:
        raise OptionError(f"a conversation goes on with one answer, not n = {options.n}")
    if options.logprobs is not None:
        raise OptionError("--logprobs are reported by llava ask --json")
    bot = terminal.load(model, revision, precision, device, options.adapter)
    session = Terminal(bot.conversation(), options, kv)
    if resume:
        session.load([str(resume)])
    session.talk.attach(*(attach or []))
    session.run()


class Terminal:
    """Reads lines, does commands, prints answers on stdout and everything else on stderr."""

    def __init__(self, talk: Conversation, options: Options, kv: bool) -> None:
        self.talk = talk
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

            self.tell("/help tells the commands")
        while (line := self.read()) not in (None, "/quit"):
            try:
                if line.startswith("/"):
                    self.command(line[1:])
                elif line:
                    self.answer(line)
            except LlavaError as error:
                self.tell(f"llava: {error}")

    def read(self) -> str | None:
        """The next line, or several joined where a line ends in a backslash; None at the end of input."""
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
            raise OptionError(f"no command /{name}; /help tells them")
        try:
            words = shlex.split(rest)
        except ValueError as error:
            raise OptionError(f"/{line}: {error}") from error
        self.commands[name](words)

    def answer(self, question: str) -> None:
        pieces = None
        try:
            with terminal.busy("looking and reading") as progress:
                pieces = self.talk.stream(question, self.options, progress=progress)
                text = next((chunk.text for chunk in pieces if chunk.text), "")
            print(text, end="", flush=True)
            for chunk in pieces:
                print(chunk.text, end="", flush=True)
        except KeyboardInterrupt:
            if pieces is not None:
                pieces.close()
            self.tell("\nbroken off; the question and its answer are not part of the conversation")
            return
        print(flush=True)

    def attach(self, words: list[str]) -> None:
        self.talk.attach(*words)
        self.files([])

    def files(self, _: list[str]) -> None:
        for part in self.talk.pending:
            self.tell(f"{part['type']}: {part.get('path') or part.get('url', '(embedded)')[:80]}")

    def undo(self, _: list[str]) -> None:
        self.tell("taken back" if self.talk.undo() else "there is nothing to take back")

    def info(self, _: list[str]) -> None:
        for name, value in self.talk.bot.info().items():
            self.tell(f"{name}: {value}")

    def new(self, _: list[str]) -> None:
        self.talk = self.talk.bot.conversation()

    def save(self, words: list[str], embed: bool = False) -> None:
        self.file = Path(words[0]) if words else self.file
        if self.file is None:
            raise OptionError("give a file name: /save chat.json")
        with terminal.busy("saving"):
            size = self.talk.save(self.file, embed=embed, kv=self.kv)
        self.tell(
            f"saved {self.file}"
            + f", and {size / 1e6:,.1f} MB beside it to go on at once" * bool(size)
        )

    def embed(self, words: list[str]) -> None:
        self.save(words, embed=True)

    def load(self, words: list[str]) -> None:
        if len(words) != 1:
            raise OptionError("give one file name: /load chat.json")
        self.talk, self.file = self.talk.bot.resume(words[0], kv=False), Path(words[0])
        self.tell(f"{len(self.talk.messages)} messages")
        try:
            with terminal.busy("reading keys and values"):
                known = self.talk.recall(self.file) if self.kv else 0
        except LlavaError as error:
            self.tell(f"llava: {error}; the conversation is there, but will be read again")
        else:
            if known:
                self.tell(f"{known:,} tokens need not be read again")

    def help(self, _: list[str]) -> None:
        self.tell(HELP)

    def tell(self, text: str) -> None:
        print(text, file=sys.stderr)
