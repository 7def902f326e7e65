"""A loaded model that answers messages: text in and out, stop strings, several answers, usage and timings."""

from __future__ import annotations

import dataclasses
import os
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import checkpoints, license_notice
from ..attribution.attribution import (
    Attribution,
    AttributionRun,
    attribute,
    check,
    last_question,
    resolve_layers,
)
from ..distributed.loading import load_shard
from ..distributed.process_group import rank_and_world_size
from ..distributed.replicated_engine import ReplicatedEngine
from ..engine import Engine, Event, SamplingParams, Timings, Usage
from ..engine.prefix_cache import CacheKey
from ..errors import CheckpointError, DataError, LlavaError, OptionError, PromptError, Unsupported
from ..image_layout import TokenReduction
from ..model import Llava
from ..options import DEFAULT_SYSTEM, DEFAULTS, MAX_NEW_TOKENS, Options
from ..placement import kv_memory, linear_backend, pick_device, pick_precision, warn_if_slow
from ..processing import Estimate, FrameSampling, Limits, Processor, TextStream
from ..prompt import Prompt
from ..quantization.replace import quantized_precision
from . import kv_file
from .attachments import content
from .conversation import Conversation
from .stop_strings import StopStrings

BUILTIN = Path(__file__).parent.parent / "builtin"
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token that was written, its natural log-probability, and the likeliest tokens in its place with theirs."""

    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `str(answer)` is its text.

    tokens: every id that was written, one that ended the answer included.
    finish_reason: "stop" at the end of the turn or a stop string, "length" at max_new_tokens.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """A piece of an answer as it is written.

    text: what is new; together the pieces are the answer's text.
    index: which of `n` answers.
    answer: the whole answer on its last chunk, before that None.
    """

    text: str
    index: int = 0
    answer: Answer | None = None


class Chatbot:
    """A model with its tokenizer and engine. Several threads may ask at once; their answers are computed together."""

    def __init__(self, source: Path, processor: Processor, engine: Engine, model: Llava) -> None:
        self.source = source
        self.processor = processor
        self.engine = engine
        self.model = model
        self._lock = threading.Lock()

    def ask(
        self,
        question: str,
        attachments: Sequence[object] = (),
        options: Options = DEFAULTS,
        **changes: object,
    ) -> Answer:
        """Ask one question about images, videos and folders of frames, given as paths, URLs, bytes, PIL images, arrays or parts.

        They stand where the question says `<image>`, or before it. Keywords are the fields of `Options`.
        """
        return self.chat(self.turn(question, attachments), options, **changes)

    def chat(self, messages: Messages, options: Options = DEFAULTS, **changes: object) -> Answer:
        """The answer to messages in the chat form of transformers and OpenAI. Keywords as `Options`."""
        options = options.but(changes)
        if options.n != 1:
            raise OptionError(
                f"ask and chat give one answer, but n is {options.n}: call choices, which gives all"
            )
        return self.choices(messages, options)[0]

    def choices(
        self, messages: Messages, options: Options = DEFAULTS, **changes: object
    ) -> list[Answer]:
        """All `n` answers to the messages, computed together; answer i is the one of seed + i. Else as `chat`."""
        answers = {
            chunk.index: chunk.answer
            for chunk in self.stream(messages, options, progress=None, **changes)
            if chunk.answer
        }
        return [answers[index] for index in sorted(answers)]

    def stream(
        self,
        messages: Messages,
        options: Options = DEFAULTS,
        *,
        progress: Callable[[int, int], None] | None = None,
        **changes: object,
    ) -> Generator[AnswerDelta]:
        """As `choices`, but a piece at a time. Closing the iterator ends the computation. Mistakes are raised by the call itself.

        progress: until the first token it is called with the tokens of the prompt that have been read so far and in all.
        """
        options = options.but(changes)
        return self.written(self.prompt(messages, options), options, progress)

    def written(
        self,
        prompt: Prompt,
        options: Options = DEFAULTS,
        progress: Callable[[int, int], None] | None = None,
    ) -> Generator[AnswerDelta]:
        """As `stream`, for a prompt that is made already."""
        room = self.model.config.text.context - len(prompt)
        how = [sampling(options, index, room) for index in range(options.n)]
        streams = {
            AnswerBuilder(self.processor, options, index): self._locked(
                self.engine.stream(prompt, one, adapter=options.adapter, progress=progress)
            )
            for index, one in enumerate(how)
        }
        return self._pieces(streams)

    def batch(
        self, conversations: Sequence[Messages], options: Options = DEFAULTS, **changes: object
    ) -> list[Answer]:
        """The answers to several conversations, computed together; each as `chat` alone would give it."""
        options = options.but(changes)
        if options.n != 1:
            raise OptionError(f"batch writes one answer to each conversation, but n is {options.n}")
        return self.answers([self.prompt(messages, options) for messages in conversations], options)

    def answers(self, prompts: Sequence[Prompt], options: Options = DEFAULTS) -> list[Answer]:
        """As `batch`, one answer to each, for prompts that are made already."""
        streams = {}
        for index, prompt in enumerate(prompts):
            how = sampling(options, 0, self.model.config.text.context - len(prompt))
            streams[AnswerBuilder(self.processor, options, index)] = self._locked(
                self.engine.stream(prompt, how, adapter=options.adapter)
            )
        answers = {chunk.index: chunk.answer for chunk in self._pieces(streams) if chunk.answer}
        return [answers[index] for index in range(len(prompts))]

    def prompt(self, messages: Messages, options: Options = DEFAULTS, **changes: object) -> Prompt:
        """What the network is given for these messages."""
        options = options.but(changes)
        return self.processor.prompt(
            messages, **processing(options), max_new_tokens=options.max_new_tokens or 1
        )

    def estimate(
        self, messages: Messages, options: Options = DEFAULTS, **changes: object
    ) -> Estimate:
        """Tokens of each part and in all, context left, and memory, without computing anything."""
        weight = self.model.language_model.norm.weight
        counted = self.processor.estimate(
            messages, **processing(options.but(changes)), number_bytes=weight.dtype.itemsize
        )
        held = checkpoints.size(
            self.processor.config, weight.dtype, quantized_precision(self.model), str(weight.device)
        )
        return dataclasses.replace(counted, weight_bytes=held)

    def explain(
        self,
        messages: Messages,
        answer: Answer | str,
        options: Options = DEFAULTS,
        *,
        layers: Sequence[int] | None = None,
        leave_out: bool = True,
        **changes: object,
    ) -> Attribution:
        """Which image an answer to `messages` leaned on, and on what in it. The options are those that it was asked with.

        answer: what `chat` gave, or a text, which counts without a token that ends it. layers: of the decoder, from 0, whose
        attention is told. leave_out: also take out each image in turn, which is a pass through the network for each; without
        it `change` and `share` are None, and there is one pass and one of the text alone. Other threads may ask meanwhile.
        """
        prompt = self.prompt(messages, options, **changes)
        tokenizer, text = self.processor.tokenizer, self.model.config.text
        if isinstance(answer, Answer) and answer.usage.prompt != len(prompt):
            raise PromptError(
                f"the answer was given to a prompt of {answer.usage.prompt} tokens, but these messages and options make "
                f"{len(prompt)}: pass those that it was asked with"
            )
        tokens = (
            answer.tokens if isinstance(answer, Answer) else tokenizer.encode(answer, special=False)
        )
        check(prompt, tokens, text.context)
        layers = resolve_layers(layers, text.num_layers)
        with self.engine.adapters.whole(options.but(changes).adapter):
            trial = AttributionRun(self.model, prompt, tokens, tokenizer.size)
            found = attribute(trial, self.processor.images, layers, leave_out)
        return Attribution(last_question(messages), str(answer), layers, *found)

    def turn(self, question: str, attachments: Sequence[object] = ()) -> list[dict[str, Any]]:
        """The messages of one question with attachments."""
        return [{"role": "user", "content": content(question, attachments)}]

    def conversation(self) -> Conversation:
        """A new conversation with this model."""
        return Conversation(self)

    def resume(self, path: str | os.PathLike[str], *, kv: bool = True) -> Conversation:
        """Go on with a conversation that `Conversation.save` wrote, with the keys and values beside it unless `kv` is False.

        Where these are of no use, a warning says why: the conversation is there, but will be read again.
        """
        talk = Conversation.load(path, self)
        try:
            if kv:
                talk.recall(path)
        except LlavaError as error:
            warnings.warn(
                f"{error}; the conversation is there, but will be read again", stacklevel=2
            )
        return talk

    def save_kv(self, path: Path, keys: CacheKey) -> int:
        """Write what is in memory of keys and values of a sequence to a file; its bytes, 0 if there is nothing. Others wait."""
        with self._lock:
            found = self.engine.save(keys)
            return kv_file.write(path, found) if found else 0

    def load_kv(self, path: Path) -> CacheKey:
        """Take in what `save_kv` wrote; the sequence that it is of. `DataError` or `CheckpointError` if it is of no use here."""
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
        """Load an adapter, a folder in PEFT's format or a Hugging Face name; it can be chosen from then on, others answer on.

        Raises `CheckpointError` for one of another network, or that asks for what is not computed here.
        """
        if isinstance(self.engine, ReplicatedEngine):
            raise Unsupported(
                "an adapter cannot be added under tensor parallelism; merge it first (llava convert --adapter)"
                " and load the merged checkpoint"
            )
        self.engine.adapters.add(name, checkpoints.read_adapter(_found(folder), self.model))

    def info(self) -> dict[str, object]:
        """Where the model is from and how it runs here."""
        weight = self.model.language_model.norm.weight
        return {
            "source": str(self.source),
            "parameters": sum(
                p.numel() for p in checkpoints.skeleton(self.processor.config).parameters()
            ),
            "precision": quantized_precision(self.model)
            or str(weight.dtype).removeprefix("torch."),
            "device": str(weight.device),
            "linears": linear_backend(self.model),
            "attention": self.engine.attention,
            "context": self.model.config.text.context,
            "tokens_per_image": self.model.config.vision.grid**2,
            "adapters": list(self.adapters),
        }

    def _pieces(self, streams: dict[AnswerBuilder, Generator[Event]]) -> Generator[AnswerDelta]:
        """Reads the events of all answers in turn, so that they are computed together."""
        try:
            while streams:
                for writer, events in list(streams.items()):
                    event = next(events)
                    text = writer.write(event)
                    if event.finish_reason or writer.stops.stopped:
                        streams.pop(writer).close()
                        yield writer.last(text, event)
                    elif text:
                        yield AnswerDelta(text, writer.index)
        finally:
            for events in streams.values():
                events.close()

    def _locked(self, events: Iterator[Event]) -> Generator[Event]:
        """The events one by one, computed while no other thread computes."""
        assert isinstance(events, Generator)
        try:
            while True:
                with self._lock:
                    event = next(events, None)
                if event is None:
                    return
                yield event
        finally:
            with self._lock:
                events.close()


def load(
    name_or_folder: str | os.PathLike[str] | None = None,
    *,
    precision: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    limits: Limits = Limits(),  # noqa: B008  frozen
    kv_bytes: int | None = None,
    kv_precision: str = "auto",
    deterministic: bool = False,
    adapters: Mapping[str, str | os.PathLike[str]] = {},
    progress: Callable[[int, int], None] | None = None,
) -> Chatbot:
    """A chatbot from a checkpoint folder or a Hugging Face name; without one, the built-in model.

    precision: float32, bfloat16, float16, or auto: float32 for a network of up to 100 M parameters and, on a CPU, for one stored
    in float32; else bfloat16 (float16 on a GPU without it, and on Apple's), with weights of 8 bits on a CPU that has kernels for
    them. int8 or int4, on a CPU or a CUDA GPU, fp8 or nf4, on a CUDA GPU, quantize the linears' weights and compute the rest as
    auto does; int4 leaves tower and output head in 8 bits. Tower, decoder and head can be apart: "int4,head=int4",
    "int8,tower=float". A folder that `llava quantize` wrote is taken as it is.
    device: cpu, cuda, cuda:1, mps, or auto: the CUDA GPU where there is one and the network fits; `Chatbot.info()` tells.
    limits: what media may be read. kv_bytes: memory for keys and values; None takes two full contexts, at most a quarter
    of the memory, and on a CUDA GPU what its largest step leaves. kv_precision: int8 keeps them in half the bytes of bfloat16;
    auto in the numbers that are computed in.
    deterministic: an answer is the same to the last bit whatever is asked beside it, on a CPU or a CUDA GPU; several at once then
    take longer.
    adapters: name and folder of each that a question can choose by the option `adapter`.
    progress: called with the bytes of weights read so far and in all.

    Where torchrun has started several processes, each takes its share of the network, on a GPU of its own if there are any. The
    first gets the chatbot; the others follow it and end with it.
    """
    folder = locate(name_or_folder, revision)
    beside = {name: _found(adapter) for name, adapter in adapters.items()}
    processor = Processor.from_folder(folder, limits=limits)
    tp_group = None
    if rank_and_world_size()[1] > 1:
        model, tp_group = load_shard(folder, precision, device, deterministic=deterministic)
    else:
        place = pick_device(device, folder, precision)
        dtype, bits = pick_precision(precision, folder, place)
        warn_if_slow(bits, dtype, place)
        model = checkpoints.load(
            folder, dtype=dtype, device=place, precision=bits, progress=progress
        )
    if name_or_folder is not None:
        license_notice.show_once(str(name_or_folder), folder)
    tokenizer, kv = (
        processor.tokenizer,
        kv_memory(model, kv_precision) if kv_bytes is None else kv_bytes,
    )
    engine = (ReplicatedEngine if tp_group else Engine)(
        model,
        eos_ids=tokenizer.eos_ids,
        vocab=tokenizer.size,
        kv_bytes=kv,
        kv_precision=kv_precision,
        deterministic=deterministic,
    )
    if tp_group and isinstance(engine, ReplicatedEngine):
        engine.start(tp_group)
    bot = Chatbot(folder, processor, engine, model)
    for name, adapter in beside.items():
        bot.add_adapter(name, adapter)
    return bot


def estimate(
    question: str,
    attachments: Sequence[object] = (),
    name_or_folder: str | os.PathLike[str] | None = None,
    options: Options = DEFAULTS,
    *,
    precision: str = "auto",
    device: str = "auto",
    revision: str | None = None,
) -> Estimate:
    """As `Chatbot.estimate` for one question, without loading weights, or fetching them where they are on the hub."""
    folder = locate(name_or_folder, revision, tensors=False)
    messages = [{"role": "user", "content": content(question, attachments)}]
    place = pick_device(device, folder, precision)
    dtype, bits = pick_precision(precision, folder, place)
    warn_if_slow(bits, dtype, place)
    processor = Processor.from_folder(folder)
    counted = processor.estimate(messages, **processing(options), number_bytes=dtype.itemsize)
    return dataclasses.replace(
        counted, weight_bytes=checkpoints.size(processor.config, dtype, bits, place)
    )


def locate(
    name_or_folder: str | os.PathLike[str] | None, revision: str | None, *, tensors: bool = True
) -> Path:
    """The folder of a checkpoint; of the built-in model without a name. From the hub without weights if `tensors` is False."""
    if name_or_folder is None and not (BUILTIN / "config.json").is_file():
        raise CheckpointError(
            "this installation carries no built-in model; name a checkpoint folder or a Hugging Face model"
        )
    name = BUILTIN if name_or_folder is None else name_or_folder
    return checkpoints.resolve(
        name if isinstance(name, str) else Path(name), revision, tensors=tensors
    )


def _found(adapter: str | os.PathLike[str]) -> Path:
    return checkpoints.resolve(adapter if isinstance(adapter, str) else Path(adapter))


def processing(options: Options) -> dict[str, Any]:
    """The part of the options that says how messages become a prompt, as `Processor` takes it."""
    return {
        "preset": options.preset,
        "system": ... if options.system == DEFAULT_SYSTEM else options.system or None,
        "anyres": options.anyres,
        "frames": FrameSampling(
            frames=options.frames, fps=options.fps, start=options.start, end=options.end
        ),
        "thin": TokenReduction(
            options.image_token_pool,
            options.video_token_pool,
            options.image_token_ratio,
            options.video_token_ratio,
        ),
        "frame_times": options.frame_times,
    }


def sampling(options: Options, index: int, room: int) -> SamplingParams:
    """The part of the options that says how tokens are chosen, for answer `index` of n and `room` tokens left in the context."""
    shared = {field.name for field in dataclasses.fields(Options)} & {
        field.name for field in dataclasses.fields(SamplingParams)
    }
    resolve_layers = {name: getattr(options, name) for name in shared}
    if options.max_new_tokens is None:
        resolve_layers["max_new_tokens"] = max(1, min(MAX_NEW_TOKENS, room))
    return SamplingParams(
        **resolve_layers | {"seed": None if options.seed is None else options.seed + index}
    )


class AnswerBuilder:
    """Collects one answer from its events: text without half characters, stop strings, log-probabilities."""

    def __init__(self, processor: Processor, options: Options, index: int) -> None:
        self.tokenizer = processor.tokenizer
        self.index = index
        self.stream = TextStream(processor.tokenizer)
        self.stops = StopStrings(options.stop)
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if options.logprobs is None else []

    def write(self, event: Event) -> str:
        """The text that is now certain to be shown; "" for the token that ended the answer."""
        if event.token is None:
            return ""
        self.tokens.append(event.token)
        if self.logprobs is not None and event.logprob is not None:
            text = self.tokenizer.decode([event.token], skip_special=False)
            self.logprobs.append(TokenLogprob(event.token, text, event.logprob, event.top_logprobs))
        return "" if event.finish_reason == "stop" else self._show(self.stream.push(event.token))

    def last(self, text: str, event: Event) -> AnswerDelta:
        """The chunk of `text`, of what was held back and of the whole answer, whose request has ended."""
        if not self.stops.stopped:
            text += self._show(self.stream.finish())
        if not self.stops.stopped:
            rest = self.stops.finish()
            self.text += rest
            text += rest
        reason = "stop" if self.stops.stopped else str(event.finish_reason)
        logprobs = None if self.logprobs is None else tuple(self.logprobs)
        request = event.request
        used = dataclasses.replace(
            request.usage, generated=len(self.tokens)
        )  # none after a stop string
        answer = Answer(self.text, tuple(self.tokens), reason, used, request.timings(0.0), logprobs)
        return AnswerDelta(text, self.index, answer)

    def _show(self, text: str) -> str:
        shown = self.stops.push(text)
        self.text += shown
        return shown
