"""Load the model that the flags name, and answer many conversations with it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..batch import Reply, ReplyFn
from ..errors import LlavaError
from ..generation_config import default_options, read
from ..options import Options
from . import flags, terminal

if TYPE_CHECKING:
    from ..chat import Answer, Chatbot
    from ..prompt import Prompt

    Batch = Callable[[Sequence[Any], Options], list[Answer]]


@dataclass(frozen=True)
class ModelFlags:
    """Which model, and how it runs.

    adapter: a folder or a Hugging Face name. limits: NAME=VALUE, as of --limit.
    """

    name: str | None
    revision: str | None = None
    precision: str = "auto"
    device: str = "auto"
    adapter: str | None = None
    batch_invariant: bool = False
    limits: tuple[str, ...] = ()
    generation_config: str = "auto"
    encoder_cache_dir: Path | None = None
    kv_precision: str = "auto"
    gpu_memory: float | None = None

    def with_adapter(self, adapter: str | None, **changes: Any) -> ModelFlags:
        """The same model with an adapter and other changes."""
        return dataclasses.replace(self, adapter=adapter, **changes)

    def load(self) -> Chatbot:
        """The chatbot, with progress on stderr (downloads draw their own bars).

        The adapter is loaded under the name that `Options.adapter` has: what the flag says.
        """
        with terminal.starting():
            from ..chat import load, locate
        locate(self.name, self.revision)
        with terminal.spinner(f"loading {self.name or 'the built-in model'}") as progress:
            bot = load(
                self.name,
                revision=self.revision,
                precision=self.precision,
                device=self.device,
                batch_invariant=self.batch_invariant,
                limits=flags.limits(self.limits),
                kv_precision=self.kv_precision,
                gpu_memory=self.gpu_memory,
                adapters={self.adapter: self.adapter} if self.adapter else {},
                generation_config=self.generation_config,
                encoder_cache_dir=self.encoder_cache_dir,
                progress=progress,
            )
        if bot.generation_config:
            print(
                f"defaults of generation_config: {bot.info()['generation_config']}", file=sys.stderr
            )
        return bot


BUILTIN_MODEL = ModelFlags(None)
"""Stands for the flags where `with_model` has not replaced it."""
_FLAGS: dict[str, tuple[str, Any, Any]] = {
    "name": ("model", flags.ModelName, None),
    "revision": ("revision", flags.Revision, None),
    "precision": ("precision", flags.Precision, "auto"),
    "device": ("device", flags.Device, "auto"),
    "kv_precision": ("kv_precision", flags.KvPrecision, "auto"),
    "gpu_memory": ("gpu_memory", flags.GpuMemory, 0.9),
    "batch_invariant": ("batch_invariant", flags.BatchInvariant, False),
    "limits": ("limit", flags.Limit, None),
    "generation_config": ("generation_config", flags.GenerationConfig, "auto"),
    "encoder_cache_dir": ("encoder_cache_dir", flags.EncoderCacheDir, None),
}
"""Fields of `ModelFlags`: the name, the type and the default of their flags."""


def with_model(*fields: str) -> Callable[[flags.Command], flags.Command]:
    """Replace a command's parameter `model` by the flags of these fields of `ModelFlags`.

    Name, revision, precision and device come first.
    """
    used = {one: _FLAGS[one] for one in ("name", "revision", "precision", "device", *fields)}

    def decorate(command: flags.Command) -> flags.Command:
        parameters: list[inspect.Parameter] = []
        for one in inspect.signature(command, eval_str=True).parameters.values():
            if one.name != "model":
                parameters.append(one)
                continue
            parameters += [
                inspect.Parameter(name, one.kind, default=default, annotation=hint)
                for name, hint, default in used.values()
            ]

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            values = {one: arguments.pop(name) for one, (name, *_) in used.items()}
            values["limits"] = tuple(values.get("limits") or ())
            command(**arguments, model=ModelFlags(**values))

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


class LazyModel:
    """The model that the flags name, loaded on first use; `about` describes it without loading."""

    def __init__(self, model: ModelFlags) -> None:
        with terminal.starting():
            from ..chat import locate
            from ..checkpoints import Checkpoint, adapter_fingerprint, resolve
            from ..distributed.process_group import rank_and_world_size
            from ..placement import pick_device, pick_precision
        self.model = model
        self._bot: Chatbot | None = None
        self._checked: Options | None = None
        self.folder = locate(model.name, model.revision)
        self.generation_config = read(self.folder, model.generation_config)
        checkpoint = Checkpoint.open(self.folder)
        device = pick_device(model.device, checkpoint, model.precision)
        dtype, bits = pick_precision(model.precision, checkpoint, device)
        self.about = {
            "model": model.name or "the built-in model",
            "fingerprint": checkpoint.fingerprint(),
            "precision": bits or str(dtype).removeprefix("torch."),
            "device": device,
        }
        if model.kv_precision != "auto":
            self.about["kv_precision"] = model.kv_precision
        if model.adapter:
            self.about["adapter"] = adapter_fingerprint(resolve(model.adapter))
        if rank_and_world_size()[1] > 1:  # ranks above 0 stay in there, before anything is written
            self._bot = model.load()

    def options(self, given: Mapping[str, Any]) -> Options:
        """As `Chatbot.options`."""
        return default_options(self.generation_config).but(given)

    def ready(self, options: Options) -> Chatbot:
        """The loaded model. Wrong options raise here, once, instead of failing every sample."""
        if self._bot is None:
            self._bot = self.model.load()
        if self._checked != options:
            alone = options.but({"max_new_tokens": 1, "orders": 1})  # one order: without images
            self._bot.batch([[{"role": "user", "content": "?"}]], alone)
            self._checked = options
        return self._bot


def answer_all(
    batch: Batch, conversations: Sequence[Any], options: Options
) -> list[Answer | LlavaError]:
    """Answer a batch; a conversation that fails has its error in place of its answer."""
    if not conversations:
        return []
    try:
        return list(batch(conversations, options))
    except LlavaError as error:
        if len(conversations) == 1:
            return [error]
    half = len(conversations) // 2
    return answer_all(batch, conversations[:half], options) + answer_all(
        batch, conversations[half:], options
    )


def replies(batch: Batch) -> ReplyFn:
    """`answer_all` in the form that `llava batch` writes."""

    def answer(conversations: Sequence[Any], options: Options) -> list[Reply | LlavaError]:
        return [
            one
            if isinstance(one, LlavaError)
            else Reply(one.text, one.finish_reason, one.usage.prompt, one.usage.generated)
            for one in answer_all(batch, conversations, options)
        ]

    return answer


def about_options(generation_config: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """The options in force, for the file of a run that may be resumed."""
    about: dict[str, Any] = {"options": dataclasses.asdict(options)}
    return about | ({"generation_config": dict(generation_config)} if generation_config else {})


@dataclass(frozen=True)
class ClusterWorker:
    """What Ray workers run: some make prompts of conversations, others answer prompts.

    given: the options of the command line.
    """

    model: ModelFlags
    given: tuple[tuple[str, Any], ...] = ()

    def about(self) -> tuple[dict[str, Any], Options]:
        model = LazyModel(self.model)
        options = model.options(dict(self.given))
        model.ready(options)
        return {**model.about, **about_options(model.generation_config, options)}, options

    def preparer(self) -> Callable[[Any, Options], Prompt]:
        from ..chat import locate
        from ..chat.chatbot import prompt_options
        from ..processing import Processor

        folder = locate(self.model.name, self.model.revision, tensors=False)
        processor = Processor.from_folder(folder, limits=flags.limits(self.model.limits))
        return lambda messages, options: processor.prompt(messages, options=prompt_options(options))

    def answerer(self) -> ReplyFn:
        bot = LazyModel(self.model).ready(Options(adapter=self.model.adapter))
        return replies(bot.answer_prompts)
