"""A conversation: history, attachments, undo, saving and resuming."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import data_url
from ..engine import Usage
from ..engine.prefix_cache import CacheKey
from ..errors import DataError, PromptError
from ..options import Options
from ..processing.formats import is_video
from ..processing.images import from_array
from .attachments import ContentPart, content, parts
from .kv_file import kv_path, replacing

if TYPE_CHECKING:
    from .chatbot import Chatbot
    from .detokenize import Answer, AnswerDelta

FORMAT = "llava-interleave conversation"
VERSION = 1


class Conversation:
    """A chat with one model. Earlier turns are not computed again: the prefix cache has them.

    messages: the turns so far, in the form that `Chatbot.chat` takes.
    pending: parts attached to the next question.
    """

    def __init__(self, bot: Chatbot, messages: list[dict[str, Any]] | None = None) -> None:
        self.bot = bot
        self.messages = list(messages or [])
        self.pending: list[ContentPart] = []
        self._cache_keys: list[CacheKey] = []  # of each answer: its prompt and its tokens

    def attach(self, *sources: object) -> None:
        """Attach images, videos or folders to the next question. Raises `MediaError`."""
        self.pending += [item for source in sources for item in parts(source)]

    def stream(
        self,
        question: str,
        options: Options | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        **changes: object,
    ) -> Generator[AnswerDelta]:
        """Ask and yield the deltas. An aborted answer leaves the conversation unchanged."""
        turn = {"role": "user", "content": content(question, self.pending)}
        for chunk in self._stream(self.messages, turn, options, progress, changes):
            if chunk.answer is not None:
                self.pending = []
            yield chunk

    def retry(
        self,
        options: Options | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        **changes: object,
    ) -> Generator[AnswerDelta]:
        """Answer the last question again, in place of its answer. Otherwise as `stream`.

        Raises `PromptError` where there is none.
        """
        last = self._last_question()
        if last is None:
            raise PromptError("there is no question to answer again")
        return self._stream(self.messages[:last], self.messages[last], options, progress, changes)

    def _stream(
        self,
        before: list[dict[str, Any]],
        turn: dict[str, Any],
        options: Options | None,
        progress: Callable[[int, int], None] | None,
        changes: dict[str, object],
    ) -> Generator[AnswerDelta]:
        messages, options = [*before, turn], self.bot.options(options, changes)
        prompt = self.bot.prompt(messages, options)
        keys = self._cache_keys[: sum(message["role"] == "user" for message in before)]
        for chunk in self.bot.stream_prompt(prompt, options, progress):
            if chunk.answer is not None and chunk.index == 0:
                reply = {
                    "role": "assistant",
                    "content": [{"type": "text", "text": chunk.answer.text}],
                }
                key = self.bot.engine.cache_key(
                    prompt, chunk.answer.tokens, adapter=options.adapter
                )
                self.messages, self._cache_keys = [*messages, reply], [*keys, key]
            yield chunk

    def _last_question(self) -> int | None:
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        return users[-1] if users else None

    def prefill(self, options: Options | None = None, **changes: object) -> Usage:
        """Prefill what is attached while the question is being typed, see `Chatbot.prefill`."""
        turn = {"role": "user", "content": [*self.pending]}
        return self.bot.prefill([*self.messages, turn], options, **changes)

    def ask(self, question: str, options: Options | None = None, **changes: object) -> Answer:
        """Ask and wait for the whole answer."""
        answers = [
            chunk.answer
            for chunk in self.stream(question, options, progress=None, **changes)
            if chunk.answer is not None
        ]
        return answers[0]

    def undo(self) -> bool:
        """Remove the last question and its answer, and attach its images again; False if none."""
        last_user = self._last_question()
        if last_user is None:
            return False
        turn = self.messages[last_user]["content"]
        self.pending = [
            *(p for p in turn if isinstance(p, dict) and p["type"] != "text"),
            *self.pending,
        ]
        del self.messages[last_user:], self._cache_keys[-1:]
        return True

    def save(self, path: str | os.PathLike[str], *, embed: bool = False, kv: bool = False) -> int:
        """Write it as JSON, atomically. Files are full paths, or their content with `embed`.

        kv: also write its KV cache to `path`.kv.safetensors (`Engine.bytes_per_token` per token),
        so that `Chatbot.resume` need not prefill it. Otherwise that file is deleted. Returns its
        bytes, 0 if there is none.
        """
        written = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.bot.source.name,
            "messages": [{**m, "content": _kept(m["content"], embed)} for m in self.messages],
            "pending": _kept(self.pending, embed),
        }
        target = Path(path)
        with replacing(target) as partial, partial.open("w", encoding="utf-8") as file:
            json.dump(written, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        size = (
            self.bot.save_kv(kv_path(target), self._cache_keys[-1])
            if kv and self._cache_keys
            else 0
        )
        if not size:
            kv_path(target).unlink(missing_ok=True)
        return size

    def load_kv(self, path: str | os.PathLike[str]) -> int:
        """Restore the KV cache saved with `path`; its number of tokens, 0 if there is none.

        Every conversation with the same beginning uses it, so load only files that you trust.
        Raises `DataError` or `CheckpointError` if it cannot be used here.
        """
        if not kv_path(path).is_file():
            return 0
        self._cache_keys.append(self.bot.load_kv(kv_path(path)))
        return len(self._cache_keys[-1].ids)

    @classmethod
    def load(cls, path: str | os.PathLike[str], bot: Chatbot) -> Conversation:
        """Read a saved conversation. Raises `DataError` for a missing or invalid file."""
        try:
            read = json.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from error
        if (
            not isinstance(read, dict)
            or read.get("format") != FORMAT
            or read.get("version") != VERSION
        ):
            raise DataError(
                f"{path} is not a conversation saved by this version (format {FORMAT!r}, version "
                f"{VERSION})"
            )
        loaded = cls(bot, read["messages"])
        loaded.pending = read["pending"]
        return loaded


def _kept(turn: str | list[ContentPart], embed: bool) -> str | list[ContentPart]:
    return turn if isinstance(turn, str) else [_stored(p, embed) for p in turn]


def _stored(p: ContentPart, embed: bool) -> ContentPart:
    """A part in a form that JSON holds."""
    if p["type"] == "views":
        views = p["views"]
        named = (
            [{"name": n, "image": v} for n, v in views.items()]
            if isinstance(views, dict)
            else views
        )
        kept = [
            {**v, "image": _source(v["image"], embed)} if isinstance(v, dict) else _source(v, embed)
            for v in named
        ]
        return {**p, "views": kept}
    stored = dict(p)
    for key in ("path", "image", "video"):
        if key not in stored:
            continue
        source = stored.pop(key)
        if key == "path" and not embed:
            stored["path"] = str(Path(source).resolve())
        elif key == "path" and Path(source).is_dir():
            stored["video"] = [
                _source(str(frame), embed)
                for frame in sorted(Path(source).iterdir())
                if frame.is_file()
            ]
        elif isinstance(source, list | tuple):
            stored[key] = [_source(frame, embed) for frame in source]
        else:
            stored["url" if key == "path" else key] = _source(source, embed)
    return stored


def _source(source: Any, embed: bool) -> str:
    """A source as text: an address, a full path, or a data URL with the content."""
    if isinstance(source, str | os.PathLike):
        name = str(source)
        if name.startswith(("http://", "https://", "data:")):
            return name
        if not embed:
            return str(Path(name).resolve())
        return _data_url(Path(name).read_bytes())
    if isinstance(source, bytes):
        return _data_url(source)
    file = BytesIO()
    (from_array(source) if hasattr(source, "shape") else source).save(file, "PNG")
    return _data_url(file.getvalue())


def _data_url(data: bytes) -> str:
    return data_url.encode(data, "video/mp4" if is_video(data) else "image/png")
