"""Samples become prompts to train on, in one of several layouts, single or in pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from ...errors import DataError, LlavaError
from ...processing import Processor
from ...processing.chat_template import PUNCTUATION, MediaPlaceholder
from ...processing.processor import PromptOptions
from ...processing.tokenizer import IMAGE
from ...prompt import Prompt
from . import formats
from .datasets import KTO_LABEL, RawSample
from .packing import Pair
from .shards import BLOCKS

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class SampleFormat:
    """The layout of samples.

    template: `chat`, or `plain`: the images, then the answer, which carries loss with the newline
    that ends it (LLaVA's version "plain"). anyres: cut the image of a single-image sample into
    tiles; None is the checkpoint's default. images_first_ratio: fraction of samples laid out by
    `move_images_first`.
    """

    template: str = "chat"
    anyres: bool | None = None
    images_first_ratio: float = 0.0

    def example(
        self,
        processor: Processor,
        messages: Messages,
        media: Sequence[object],
        *,
        images_first: bool = False,
    ) -> Prompt:
        """A whole sample with its loss mask."""
        if self.template == "chat":
            moved = move_images_first(messages, len(media)) if images_first else messages
            return processor.example(moved, media, anyres=self._tiled(messages, media))
        images = self.question(processor, messages, media)
        answer = _plain_answer(processor, messages, len(media))
        weight = float(messages[-1].get("loss", True))
        loss_mask = [0.0] * len(images) + [weight] * len(answer)
        return Prompt(images.tokens + answer, images.media, loss_mask)

    def question(self, processor: Processor, messages: Messages, media: Sequence[object]) -> Prompt:
        """A sample up to its last answer."""
        if self.template == "chat":
            return processor.prompt(messages[:-1], media, anyres=self._tiled(messages, media))
        rest = iter(media)
        slots = formats.placeholders(messages, len(media))
        sources = [next(rest) if slot.source is None else slot.source for slot, _ in slots]
        return processor.raw(IMAGE * len(sources), sources)

    def count(
        self, processor: Processor, messages: Messages, media: Sequence[object]
    ) -> tuple[int, int]:
        """Tokens and images (with video frames; tiles are one) of `example`, without decoding."""
        options = PromptOptions(anyres=self._tiled(messages, media), add_generation_prompt=False)
        text, sizes = processor.count(messages, media, options)
        if self.template != "chat":
            text = len(_plain_answer(processor, messages, len(media)))
        return text + sum(tokens for tokens, _ in sizes), sum(frames for _, frames in sizes)

    def count_turns(
        self, processor: Processor, texts: Sequence[str], images: Sequence[str]
    ) -> tuple[int, int]:
        """Tokens of `example` for questions and answers in turn with `<image>` for files, as they
        are and, where the format has that, with the images first; template chat."""
        moved = _turns_images_first(texts) if self.images_first_ratio else None
        layouts = [texts, moved] if moved else [texts]
        counts = processor.count_turns(layouts, images, self.anyres)
        return counts[0], counts[-1]

    def _tiled(self, messages: Messages, media: Sequence[object]) -> bool | None:
        return self.anyres and len(formats.placeholders(messages, len(media))) == 1


def _plain_answer(processor: Processor, messages: Messages, media: int) -> list[int]:
    """The tokens of a plain sample's answer. Raises DataError for more than one question."""
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if roles != ["user", "assistant"]:
        raise DataError("template plain takes one question and its answer, without more turns")
    answer = formats.turns_of(messages, media)[-1]
    texts = [
        piece
        for part in answer.parts
        if not isinstance(part, MediaPlaceholder)
        for piece in part
        if isinstance(piece, str)
    ]
    return processor.tokenizer.encode("".join(texts) + "\n", special=False)


def move_images_first(messages: Messages, media: int) -> Messages:
    """All images before the text of the first question; `[image 1]`, ... take their places.

    The published mixture has such samples ("in-the-front"; its marks are not published). Unchanged
    are samples with fewer than two images, with all images first, with images in answers, or with
    views, whose names say where they belong. media: as of `formats.placeholders`.
    """
    whole = [part for message in messages for part in _pieces(message["content"], True)]
    by_parts = sum(part.get("type") in formats.MEDIA_TYPES for part in whole)
    literal = by_parts == len(formats.placeholders(messages, media)) > 0
    moved: list[Mapping[str, Any]] = []
    changed: list[dict[str, Any]] = []
    image_after_text = text_before = False
    for message in messages:
        parts: list[Mapping[str, Any]] = []
        for part in _pieces(message["content"], literal):
            tag = part == {"type": "text", "text": IMAGE} and not literal
            image = part.get("type") in formats.MEDIA_TYPES or tag
            if part.get("type") == "views" or (image and message["role"] != "user"):
                return messages
            if image:
                moved.append(part)
                image_after_text |= text_before
                parts.append({"type": "text", "text": f"[image {len(moved)}]"})
            else:
                text_before |= message["role"] == "user" and bool(part["text"].strip())
                parts.append(part)
        changed.append({**message, "content": parts})
    if len(moved) < 2 or not image_after_text:
        return messages
    first = next(message for message in changed if message["role"] == "user")
    for message in changed:
        message["content"] = "".join(part["text"] for part in message["content"])
    first["content"] = [*moved, {"type": "text", "text": first["content"]}]
    return changed


def _turns_images_first(texts: Sequence[str]) -> list[str] | None:
    """`move_images_first` of questions and answers in turn, as texts; None where it is unchanged.

    The newlines are those with which `chat_template.render` separates content parts.
    """
    questions: list[str] = []
    images, image_after_text, text_before = 0, False, False
    for text in texts[::2]:
        question, *rest = text.split(IMAGE)
        text_before |= bool(question.strip())
        for piece in rest:
            images += 1
            image_after_text |= text_before
            text_before |= bool(piece.strip())
            question += f"[image {images}]{piece}"
        questions.append(question)
    if images < 2 or not image_after_text:
        return None
    first = questions[0]
    joined = not first or first[0].isspace() or first[0] in PUNCTUATION
    questions[0] = "\n".join([IMAGE] * images) + ("" if joined else "\n") + first
    return [text for turn in zip(questions, texts[1::2], strict=True) for text in turn]


def _pieces(content: Any, literal: bool) -> Iterator[Mapping[str, Any]]:
    """The parts of a message; unless it is `literal`, each `<image>` in a text is one."""
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part.get("type") != "text" or literal:
            yield part
            continue
        for number, text in enumerate(part["text"].split(IMAGE)):
            if number:
                yield {"type": "text", "text": IMAGE}
            if text:
                yield {"type": "text", "text": text}


@dataclass(frozen=True, slots=True)
class PackedSample:
    """A sample, or the two sides of a pair: what is packed as one.

    tokens, images: of it, images with video frames; a pair's images are there once.
    images_first_tokens: tokens with the images first.
    """

    rows: Sequence[RawSample]
    tokens: int
    images_first_tokens: int
    images: int

    @property
    def name(self) -> str:
        return self.rows[0].pair or self.rows[0].name


@dataclass(frozen=True)
class Samples:
    """Example i: sample number i, counted on through any number of epochs, each in its own order.

    references: of pairs, by name, the log-probabilities of both answers under the reference model.
    """

    packed: Sequence[PackedSample]
    model: Path
    seed: int
    form: SampleFormat = SampleFormat()
    references: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    orders: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict)

    @cached_property
    def epoch(self) -> int:
        """Examples of an epoch: the samples, each as often as its weight says."""
        return len(self._order(0))

    def __call__(self, index: int) -> Prompt | Pair:
        return self.make(*self._drawn(index))

    def sample(self, index: int) -> PackedSample:
        """The sample of example i."""
        return self._drawn(index)[0]

    def length(self, index: int) -> int:
        """Tokens of example i."""
        sample, images_first = self._drawn(index)
        return sample.images_first_tokens if images_first else sample.tokens

    def images(self, index: int) -> int:
        """Images and video frames of example i."""
        return self._drawn(index)[0].images

    def make(self, sample: PackedSample, images_first: bool = False) -> Prompt | Pair:
        """Raises DataError naming the sample."""
        processor = formats.processor(self.model)
        try:
            messages, media = sample.rows[0].messages()
            if len(sample.rows) == 1:
                return self.form.example(processor, messages, media, images_first=images_first)
            question = self.form.question(processor, messages, media)
            chosen, rejected = (
                _with_answer(processor, question, answer)
                for answer in (messages[-1], sample.rows[1].messages()[0][-1])
            )
            reference = self.references.get(sample.name, (0.0, 0.0))
            label = sample.rows[0].sample.get(KTO_LABEL, True)
            return Pair(chosen, rejected, reference, label)
        except LlavaError as error:
            raise DataError(f"sample {sample.name}: {error}") from error

    def _drawn(self, index: int) -> tuple[PackedSample, bool]:
        epoch, number = divmod(index, self.epoch)
        ratio = self.form.images_first_ratio
        images_first = ratio > 0 and Random(f"front/{self.seed}/{index}").random() < ratio
        return self.packed[int(self._order(epoch)[number])], images_first

    def _order(self, epoch: int) -> np.ndarray[Any, Any]:
        if epoch not in self.orders:
            if len(self.orders) > 1:  # the window at the end of an epoch needs two
                self.orders.pop(min(self.orders))
            column = getattr(self.packed, "column", None)
            weights = np.ones(len(self.packed), "<f4") if column is None else column("weight")
            blocks = None if column is None else column("block")
            self.orders[epoch] = epoch_order(weights, blocks, self.seed + epoch)
        return self.orders[epoch]


def epoch_order(
    weights: np.ndarray[Any, Any], blocks: np.ndarray[Any, Any] | None, seed: int
) -> np.ndarray[Any, Any]:
    """The numbers of an epoch's samples in a random order.

    weights `[N]`: how often a sample is there; of the fractions of equal weights as many samples as
    they make up, drawn at random. blocks `[N]`: samples of a block are read together, so that only
    the samples of `BLOCKS` blocks are mixed; -1 for a sample that may be anywhere.
    """
    generator = np.random.default_rng(seed)
    numbers = np.arange(len(weights), dtype="<i4")
    if (weights != 1).any():
        times = np.floor(weights).astype("<i4")
        for weight in np.unique(weights):
            alike = np.flatnonzero(weights == weight)
            more = round(float(weight % 1) * len(alike))
            times[generator.permutation(alike)[:more]] += 1
        numbers = np.repeat(numbers, times)
    if blocks is not None and (blocks >= 0).any():
        held, anywhere = blocks[numbers], blocks[numbers] < 0
        names, held = np.unique(held, return_inverse=True)
        count = len(names)
        windows = generator.permutation(count)[held] // BLOCKS
        windows[anywhere] = generator.integers(-(-count // BLOCKS), size=int(anywhere.sum()))
        return numbers[np.lexsort((generator.random(len(numbers)), windows))]
    shuffled = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    return numbers[shuffled.numpy()]


def _with_answer(processor: Processor, question: Prompt, answer: Mapping[str, Any]) -> Prompt:
    """A question, whose answer has begun, with an answer: the tokens of the whole conversation."""
    alone = processor.example([answer], system=None)
    assert alone.loss_mask is not None
    begin = alone.loss_mask.index(True)
    loss_mask = [False] * len(question) + [*alone.loss_mask[begin:]]
    return Prompt(question.tokens + alone.tokens[begin:], question.media, loss_mask)
