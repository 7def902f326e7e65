"""A loaded model that answers messages: whole, streamed, batched; estimates and attributions."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import checkpoints, generation_config
from ..attribution.attribution import (
    Attribution,
    LeaveOut,
    attribute,
    check,
    check_layouts,
    last_question,
    resolve_layers,
)
from ..attribution.citations import cite, cite_text
from ..attribution.forward import AttributionRun
from ..distributed.replicated_engine import ReplicatedEngine
from ..engine import Engine, Usage
from ..engine.prefix_cache import CacheKey
from ..errors import DataError, LlavaError, OptionError, PromptError, Unsupported
from ..image_layout import TokenReduction
from ..model import Llava
from ..options import DEFAULT_SYSTEM, DEFAULTS, MAX_NEW_TOKENS, Options
from ..placement import linear_backend
from ..processing import DEFAULT, Estimate, FrameSampling, Processor, PromptOptions
from ..prompt import Prompt
from ..quantization.replace import quantized_precision
from . import kv_file, table
from .attachments import content
from .columns import Column, read_columns
from .conversation import Conversation
from .detokenize import Answer, AnswerDelta
from .engine_driver import MAX_PREFILL_DELAY, EngineDriver, FairLock, GenerationJob
from .live import LiveSession

BUILTIN = Path(__file__).parent.parent / "builtin"
Messages = Sequence[Mapping[str, Any]]


class Chatbot:
    """A model with its processor and engine. Requests of several threads are batched.

    defaults: options of the checkpoint's generation_config.json. `default_options` has them: the
    options of a call without a record of its own, which its keywords change.
    """

    def __init__(
        self,
        source: Path,
        processor: Processor,
        engine: Engine,
        model: Llava,
        defaults: Mapping[str, Any] = {},
    ) -> None:
        self.source = source
        self.processor = processor
        self.engine = engine
        self.model = model
        self.generation_config = dict(defaults)
        self.default_options = generation_config.default_options(defaults)
        self.max_new_tokens: int = defaults.get("max_new_tokens", MAX_NEW_TOKENS)
        self._driver = EngineDriver(engine, processor.tokenizer, self.max_new_tokens)
        self._lock = FairLock()

    def ask(
        self,
        question: str,
        attachments: Sequence[object] = (),
        options: Options | None = None,
        **changes: object,
    ) -> Answer:
        """Ask one question about images, videos and folders of frames.

        They are paths, URLs, bytes, PIL images, arrays or message parts.

        They are placed at `<image>` in the question, or before it. Keywords: fields of `Options`,
        which change `options`, or `default_options` without them.
        """
        return self.chat(self.turn(question, attachments), options, **changes)

    def chat(self, messages: Messages, options: Options | None = None, **changes: object) -> Answer:
        """The answer to messages as of transformers or OpenAI. Keywords: fields of `Options`."""
        options = self.options(options, changes)
        if options.n != 1:
            raise OptionError(
                f"ask and chat give one answer, but n is {options.n}: call choices, which gives all"
            )
        return self.choices(messages, options)[0]

    def choices(
        self, messages: Messages, options: Options | None = None, **changes: object
    ) -> list[Answer]:
        """All `n` answers, computed together; answer i uses seed + i. Otherwise as `chat`."""
        options = self.options(options, changes)
        return self.answer_jobs([GenerationJob(self.prompt(messages, options), options)])

    def stream(
        self,
        messages: Messages,
        options: Options | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        **changes: object,
    ) -> Generator[AnswerDelta]:
        """As `choices`, in deltas. Invalid arguments raise here; closing the iterator aborts.

        progress: called before the first token with the prompt tokens prefilled so far and in all.
        """
        options = self.options(options, changes)
        return self.stream_prompt(self.prompt(messages, options), options, progress)

    def stream_prompt(
        self,
        prompt: Prompt,
        options: Options | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Generator[AnswerDelta]:
        """As `stream`, for a prompt from `prompt`."""
        return self._generate([GenerationJob(prompt, self.options(options))], progress)

    def prefill(
        self, messages: Messages, options: Options | None = None, **changes: object
    ) -> Usage:
        """Compute the beginning of a coming question into the prefix cache, without an answer.

        The question then computes only the tokens after the common prefix. A prefill runs while
        there is nothing else to do; requests that arrive meanwhile go first. Returns the tokens of
        the prompt, and those that were cached already.
        """
        options = self.options(options, {**changes, "n": 1, "cite": False, "orders": 1})
        job = GenerationJob(self.prompt(messages, options), options, prefill_only=True)
        return self.answer_jobs([job])[0].usage

    def batch(
        self, conversations: Sequence[Messages], options: Options | None = None, **changes: object
    ) -> list[Answer]:
        """The answers to several conversations, computed together; each is that of `chat` alone."""
        options = self.options(options, changes)
        if options.n != 1:
            raise OptionError(f"batch writes one answer to each conversation, but n is {options.n}")
        return self.answer_prompts(
            [self.prompt(messages, options) for messages in conversations], options
        )

    def answer_prompts(
        self, prompts: Sequence[Prompt], options: Options | None = None
    ) -> list[Answer]:
        """As `batch`, for prompts from `prompt`."""
        resolved = self.options(options)
        return self.answer_jobs(
            [GenerationJob(prompt, resolved, index) for index, prompt in enumerate(prompts)]
        )

    def each(
        self,
        images: str | os.PathLike[str] | Sequence[object],
        columns: Mapping[str, Any] | Sequence[Column] | type,
        options: Options = DEFAULTS,
        **changes: object,
    ) -> Generator[table.Row]:
        """Ask questions about each image alone: a row of typed cells per image, in order.

        images: a folder, or images and videos as of `ask`. columns: a question by name, or a pair
        (question, type) with str, int, float, bool or a `Literal` of texts, or a pydantic model
        whose descriptions are the questions. Invalid columns raise `OptionError` here; an image
        that cannot be read has its error in its cells. Questions that compare images: `ask`.
        Answers are greedy, whatever the checkpoint's generation_config.json says.
        """
        run = table.TableRun(self, read_columns(columns), options.but(changes))
        return run.rows(table.sources(images))

    def find(
        self,
        question: str,
        images: str | os.PathLike[str] | Sequence[object],
        options: Options = DEFAULTS,
        **changes: object,
    ) -> list[table.Hit]:
        """The images by the probability that the answer to a yes/no question about them is yes."""
        columns = {"hit": (question, bool)}
        return table.find_hits(list(self.each(images, columns, options, **changes)), "hit")

    def live(
        self,
        keep: int = 32,
        least: int = 16,
        options: Options | None = None,
        **changes: object,
    ) -> LiveSession:
        """A session that frames are appended to, with questions about the last ones at any time.

        keep, least: most frames; when they are reached, the oldest go until `least` are left. The
        options hold for frames and questions. Raises `OptionError` where `keep` do not fit.
        """
        return LiveSession(self, keep, least, self.options(options, changes))

    def options(
        self, options: Options | None = None, changes: Mapping[str, object] = {}
    ) -> Options:
        """`options`, or without them the defaults, with `changes`."""
        return (self.default_options if options is None else options).but(changes)

    def prompt(
        self,
        messages: Messages,
        options: Options | None = None,
        *,
        continue_final_message: bool = False,
        **changes: object,
    ) -> Prompt:
        """What the network is given for these messages.

        continue_final_message: the last message is the beginning of an answer to be continued.
        """
        form = dataclasses.replace(
            prompt_options(self.options(options, changes)),
            continue_final_message=continue_final_message,
            add_generation_prompt=not continue_final_message,
        )
        return self.processor.prompt(messages, options=form)

    def estimate(
        self, messages: Messages, options: Options | None = None, **changes: object
    ) -> Estimate:
        """Tokens of each part and in all, context left, and memory, without computing anything."""
        weight = self.model.language_model.norm.weight
        counted = self.processor.estimate(
            messages,
            options=prompt_options(self.options(options, changes)),
            number_bytes=weight.dtype.itemsize,
        )
        held = checkpoints.weight_bytes(
            self.processor.config, weight.dtype, quantized_precision(self.model)
        )
        return dataclasses.replace(counted, weight_bytes=held)

    def attribute(
        self,
        messages: Messages,
        answer: Answer | str,
        options: Options | None = None,
        *,
        layers: Sequence[int] | None = None,
        leave_out: LeaveOut = True,
        **changes: object,
    ) -> Attribution:
        """Attribute an answer to its images: leave-one-out changes and attention maps.

        The options must be those of the answer. answer: from `chat`, or a text, which has no token
        that ends it. layers: of the decoder, from 0, for the attention maps. leave_out: hide each
        image from the question and the answer ("exact": also from the images after it, which takes
        a pass over them); False: `change` and `share` are None. What the engine has cached of the
        prompt is not computed again. Other threads can use the chatbot meanwhile.
        """
        options = self.options(options, changes)
        if options.orders > 1:
            raise OptionError("an answer to several orders of the images is not attributed")
        prompt = self.prompt(messages, options)
        tokenizer, text = self.processor.tokenizer, self.model.config.text
        if isinstance(answer, Answer) and answer.usage.prompt != len(prompt):
            raise PromptError(
                f"the answer belongs to a prompt of {answer.usage.prompt} tokens, but these "
                f"messages and options make {len(prompt)}: pass those of the answer"
            )
        tokens = (
            answer.tokens if isinstance(answer, Answer) else tokenizer.encode(answer, special=False)
        )
        check(prompt, tokens, text.context)
        layers = resolve_layers(layers, text.num_layers)
        with self._lock:
            cached = self.engine.cached_prompt(prompt, adapter=options.adapter)
        with self.engine.adapters.whole(options.adapter):
            run = AttributionRun(self.model, prompt, tokens, tokenizer.size, cached=cached)
            result = attribute(run, self.processor.images, layers, leave_out)
        return Attribution(last_question(messages), str(answer), layers, *result)

    def turn(self, question: str, attachments: Sequence[object] = ()) -> list[dict[str, Any]]:
        """The messages of one question with attachments."""
        return [{"role": "user", "content": content(question, attachments)}]

    def conversation(self) -> Conversation:
        """A new conversation with this model."""
        return Conversation(self)

    def resume(self, path: str | os.PathLike[str], *, kv: bool = True) -> Conversation:
        """Continue a conversation of `Conversation.save`; with its KV cache unless `kv` is False.

        If the KV cache cannot be used, a warning says why, and the conversation is prefilled again.
        """
        talk = Conversation.load(path, self)
        try:
            if kv:
                talk.load_kv(path)
        except LlavaError as error:
            warnings.warn(
                f"{error}; the conversation is there, but will be read again", stacklevel=2
            )
        return talk

    def save_kv(self, path: Path, keys: CacheKey) -> int:
        """Write the KV cache of a sequence to a file; its bytes, 0 if nothing is cached."""
        with self._lock:
            found = self.engine.save(keys)
            return kv_file.write(path, found) if found else 0

    def load_kv(self, path: Path) -> CacheKey:
        """Restore a file of `save_kv`; `DataError` or `CheckpointError` if it cannot be used."""
        found = kv_file.read(path, self.engine.load().kv_total * self.engine.bytes_per_token)
        try:
            with self._lock:
                return self.engine.restore(found)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names that the option `adapter` takes here."""
        return self.engine.adapters.names

    def add_adapter(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Load a LoRA adapter: a folder in PEFT's format or a Hugging Face name.

        Raises `CheckpointError` for one of another model, or with unsupported features.
        """
        if isinstance(self.engine, ReplicatedEngine):
            raise Unsupported(
                "an adapter cannot be added under tensor parallelism; merge it first "
                "(llava convert --adapter) and load the merged checkpoint"
            )
        self.engine.adapters.add(name, checkpoints.read_adapter(adapter_folder(folder), self.model))

    def info(self) -> dict[str, object]:
        """Where the model is from and how it runs here."""
        weight, config = self.model.language_model.norm.weight, self.model.config
        return {
            "source": str(self.source),
            "parameters": self.processor.config.num_parameters,
            "precision": quantized_precision(self.model)
            or str(weight.dtype).removeprefix("torch."),
            "device": str(weight.device),
            "linears": linear_backend(self.model),
            "attention": self.engine.attention,
            "context": config.text.context,
            "tokens_per_image": config.image_layout.length,
            "max_tokens_per_image": config.max_tokens_per_image,
            "tokens_per_frame": config.video_layout(2).length // 2,
            "adapters": list(self.adapters),
            "generation_config": generation_config.describe(self.generation_config) or "none",
        }

    def answer_jobs(self, jobs: list[GenerationJob]) -> list[Answer]:
        """The answers to jobs, by their indices, computed together."""
        deltas = self._generate(jobs)
        answers = {delta.index: delta.answer for delta in deltas if delta.answer is not None}
        return [answers[index] for index in sorted(answers)]

    def _generate(
        self, jobs: list[GenerationJob], progress: Callable[[int, int], None] | None = None
    ) -> Generator[AnswerDelta]:
        """Queue jobs now, so that errors are raised here, and return their deltas."""
        for job in jobs:
            if job.options.cite:
                self._check_citable(job.prompt)
        deltas = self._deltas(jobs, progress)
        next(deltas)
        return deltas

    def _deltas(
        self, jobs: list[GenerationJob], progress: Callable[[int, int], None] | None
    ) -> Generator[AnswerDelta]:
        """First an empty delta once the jobs are queued, then those of all jobs.

        The thread that holds the lock computes a step for the jobs of all threads.
        """
        try:
            with self._lock:
                for job in jobs:
                    self._driver.add(job)
            yield AnswerDelta("")
            while True:
                with self._lock:
                    if not any(job.items for job in jobs):
                        if not any(job.running for job in jobs):
                            return
                        prefill_only = all(job.prefill_only for job in self._driver.jobs)
                        budget = MAX_PREFILL_DELAY if prefill_only else math.inf
                        for job, item in self._driver.step(budget):
                            job.items.append(item)
                        if progress:
                            _report(jobs, progress)
                for job in jobs:
                    while job.items:
                        item = job.items.popleft()
                        if isinstance(item, Exception):
                            raise item
                        if item.answer is not None and job.options.cite:
                            answer = self._cited(job, item.answer)
                            item = dataclasses.replace(item, answer=answer)
                        yield item
        finally:
            with self._lock:
                for job in jobs:
                    self._driver.abort(job)

    def _check_citable(self, prompt: Prompt) -> None:
        check_layouts(prompt)
        if isinstance(self.engine, ReplicatedEngine):
            raise Unsupported("citations are not supported under tensor parallelism")

    def _cited(self, job: GenerationJob, answer: Answer) -> Answer:
        """The answer with its citations. Other threads can use the chatbot meanwhile."""
        tokenizer, adapter = self.processor.tokenizer, job.options.adapter
        parts = [tokenizer.token_bytes(token) for token in answer.tokens]
        if not job.prompt.media:
            return dataclasses.replace(answer, citations=cite_text(parts, answer.text))
        with self._lock:
            cached = self.engine.cached_prompt(job.prompt, salt=job.salt, adapter=adapter)
        with self.engine.adapters.whole(adapter):
            run = AttributionRun(
                self.model, job.prompt, answer.tokens, tokenizer.size, cached=cached
            )
            return dataclasses.replace(answer, citations=cite(run, parts, answer.text))


def _report(jobs: list[GenerationJob], progress: Callable[[int, int], None]) -> None:
    """Call `progress` for every answer whose prompt is being prefilled."""
    for job in jobs:
        for request in job.running:
            if request.kv is not None and not request.generated:
                progress(request.kv.length, len(job.prompt))


def prompt_options(options: Options) -> PromptOptions:
    """The part of the options that decides how messages become a prompt."""
    return PromptOptions(
        preset=options.preset,
        system=DEFAULT if options.system == DEFAULT_SYSTEM else options.system or None,
        anyres=options.anyres,
        frames=FrameSampling(
            frames=options.frames, fps=options.fps, start=options.start, end=options.end
        ),
        reduction=TokenReduction(
            options.image_token_pool,
            options.video_token_pool,
            options.image_token_ratio,
            options.video_token_ratio,
        ),
        frame_times=options.frame_times,
        max_new_tokens=options.max_new_tokens or 1,
    )


def adapter_folder(name_or_folder: str | os.PathLike[str]) -> Path:
    """The folder of an adapter, downloaded if it is a Hugging Face name."""
    name = name_or_folder if isinstance(name_or_folder, str) else Path(name_or_folder)
    return checkpoints.resolve(name)
