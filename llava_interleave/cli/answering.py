"""Answering many conversations with a model, where one that cannot be answered does not take the others with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import LlavaError
from ..options import Options
from . import show

if TYPE_CHECKING:
    from ..chatbot import Answer, Chatbot


class Model:
    """The model that the flags name, loaded when it is first asked; what it is can be told before."""

    def __init__(self, name: str | None, revision: str | None, precision: str, device: str, adapter: str | None = None) -> None:
        with show.busy("starting"):
            from ..chatbot import locate
            from ..chatbot.place import pick_device, pick_precision
            from ..weights import adapter_fingerprint, fingerprint, resolve
        self._flags = (name, revision, precision, device, adapter)
        self._bot: Chatbot | None = None
        self._checked: Options | None = None
        self.folder = locate(name, revision)
        place = pick_device(device)
        dtype, bits = pick_precision(precision, self.folder, place)
        self.about = {
            "model": name or "the built-in model",
            "fingerprint": fingerprint(self.folder),
            "precision": bits or str(dtype).removeprefix("torch."),
            "device": place,
        }
        if adapter:
            self.about["adapter"] = adapter_fingerprint(resolve(adapter))

    def ready(self, options: Options) -> Chatbot:
        """The model, loaded. A mistake in the options is raised, so that it is told once and not beside every sample."""
        if self._bot is None:
            self._bot = show.load(*self._flags)
        if self._checked != options:
            self._bot.batch([[{"role": "user", "content": "?"}]], options.but({"max_new_tokens": 1}))
            self._checked = options
        return self._bot


def answers(bot: Chatbot, asked: Sequence[Sequence[Mapping[str, Any]]], options: Options) -> list[Answer | LlavaError]:
    """The answers, computed together; in the place of one that cannot be made stands the reason."""
    if not asked:
        return []
    try:
        return list(bot.batch(asked, options))
    except LlavaError as error:
        if len(asked) == 1:
            return [error]
    half = len(asked) // 2
    return answers(bot, asked[:half], options) + answers(bot, asked[half:], options)
