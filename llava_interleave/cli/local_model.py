"""Answering many conversations with a model, where one that cannot be answered does not take the others with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..batch import Answerer, Reply
from ..errors import LlavaError
from ..options import Options
from . import terminal

if TYPE_CHECKING:
    from ..chat import Answer, Chatbot
    from ..prompt import Prompt

    Batch = Callable[[Sequence[Any], Options], list[Answer]]


class LazyModel:
    """The model that the flags name, loaded when it is first asked; what it is can be told before."""

    def __init__(
        self,
        name: str | None,
        revision: str | None,
        precision: str,
        device: str,
        adapter: str | None = None,
        deterministic: bool = False,
    ) -> None:
        with terminal.busy("starting"):
            from ..chat import locate
            from ..checkpoints import adapter_fingerprint, fingerprint, resolve
            from ..distributed.process_group import rank_and_world_size
            from ..placement import pick_device, pick_precision
        self._flags = (name, revision, precision, device, adapter, deterministic)
        self._bot: Chatbot | None = None
        self._checked: Options | None = None
        self.folder = locate(name, revision)
        place = pick_device(device, self.folder, precision)
        dtype, bits = pick_precision(precision, self.folder, place)
        self.about = {
            "model": name or "the built-in model",
            "fingerprint": fingerprint(self.folder),
            "precision": bits or str(dtype).removeprefix("torch."),
            "device": place,
        }
        if adapter:
            self.about["adapter"] = adapter_fingerprint(resolve(adapter))
        if (
            rank_and_world_size()[1] > 1
        ):  # all but one process stay there, before anything is written
            self._bot = terminal.load(*self._flags)

    def ready(self, options: Options) -> Chatbot:
        """The model, loaded. A mistake in the options is raised, so that it is told once and not beside every sample."""
        if self._bot is None:
            self._bot = terminal.load(*self._flags)
        if self._checked != options:
            self._bot.batch(
                [[{"role": "user", "content": "?"}]], options.but({"max_new_tokens": 1})
            )
            self._checked = options
        return self._bot


def answer_all(batch: Batch, asked: Sequence[Any], options: Options) -> list[Answer | LlavaError]:
    """The answers that `batch` computes together; in the place of one that cannot be made stands the reason."""
    if not asked:
        return []
    try:
        return list(batch(asked, options))
    except LlavaError as error:
        if len(asked) == 1:
            return [error]
    half = len(asked) // 2
    return answer_all(batch, asked[:half], options) + answer_all(batch, asked[half:], options)


def replies(batch: Batch) -> Answerer:
    """`answers` as `llava batch` writes them."""

    def answer(asked: Sequence[Any], options: Options) -> list[Reply | LlavaError]:
        return [
            said
            if isinstance(said, LlavaError)
            else Reply(said.text, said.finish_reason, said.usage.prompt, said.usage.generated)
            for said in answer_all(batch, asked, options)
        ]

    return answer


@dataclass(frozen=True)
class ClusterWorker:
    """A model by its flags, for a cluster's processes: some make prompts of conversations, others answer prompts."""

    name: str | None
    revision: str | None
    precision: str
    device: str
    adapter: str | None
    deterministic: bool

    def about(self, options: Options) -> dict[str, Any]:
        model = self._model()
        model.ready(options)
        return model.about

    def preparer(self) -> Callable[[Any, Options], Prompt]:
        from ..chat import locate
        from ..chat.chatbot import processing
        from ..processing import Processor

        processor = Processor.from_folder(locate(self.name, self.revision, tensors=False))
        return lambda messages, options: processor.prompt(
            messages, **processing(options), max_new_tokens=options.max_new_tokens or 1
        )

    def answerer(self) -> Answerer:
        return replies(self._model().ready(Options(adapter=self.adapter)).answers)

    def _model(self) -> LazyModel:
        return LazyModel(
            self.name, self.revision, self.precision, self.device, self.adapter, self.deterministic
        )
