"""Samples become prompts to train on: as a conversation or plain, images where they stand or all in front, alone or in pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import torch

from ..errors import DataError, LlavaError
from ..processing import FrameSampling, Processor
from ..processing.chat_template import MediaPlaceholder, parse
from ..processing.tokenizer import IMAGE
from ..prompt import Prompt
from . import formats
from .datasets import RawSample
from .packing import Pair

Messages = Sequence[Mapping[str, Any]]
PICTURES = ("image", "image_url", "video", "video_url")


@dataclass(frozen=True, slots=True)
class SampleFormat:
    """How samples are laid out.

    template: `chat`, or `plain`: the images, then the answer, which is learnt with the newline that ends it (LLaVA's version
    "plain"). anyres: cut the image of a sample with one into tiles. front: share of samples as `in_front` makes them.
    """

    template: str = "chat"
    anyres: bool = False
    front: float = 0.0

    def example(
        self, processor: Processor, said: Messages, media: Sequence[object], *, front: bool = False
    ) -> Prompt:
        """A whole sample, with its answers marked."""
        if self.template == "chat":
            return processor.example(
                in_front(said) if front else said, media, anyres=self._tiled(said)
            )
        shown, words = self.question(processor, said, media), _words(processor, said)
        loss_mask = [False] * len(shown) + [True] * len(words)
        return Prompt(shown.tokens + words, shown.media, loss_mask)

    def question(self, processor: Processor, said: Messages, media: Sequence[object]) -> Prompt:
        """A sample up to its last answer, to be answered."""
        if self.template == "chat":
            return processor.prompt(said[:-1], media, anyres=self._tiled(said))
        rest = iter(media)
        sources = [next(rest) if slot.source is None else slot.source for slot in _slots(said)]
        return processor.raw(IMAGE * len(sources), sources)

    def count(
        self, processor: Processor, said: Messages, media: Sequence[object], *, front: bool = False
    ) -> tuple[int, int]:
        """Tokens of `example`, and images with frames of videos; nothing is decoded. One in tiles is one."""
        shown = in_front(said) if front else said
        found = processor.estimate(
            shown, media, anyres=self._tiled(said), add_generation_prompt=False
        )
        pictures = sum(part.tokens for part in found.parts[1:])
        images = 1 if self._tiled(said) else pictures // processor.config.vision.grid**2
        return found.total if self.template == "chat" else pictures + len(
            _words(processor, said)
        ), images

    def _tiled(self, said: Messages) -> bool:
        return self.anyres and len(_slots(said)) == 1


def _slots(said: Messages) -> list[MediaPlaceholder]:
    pieces = [part for turn in parse(said, FrameSampling()) for part in turn.parts]
    return [
        piece
        for part in pieces
        for piece in ([part] if isinstance(part, MediaPlaceholder) else part)
        if isinstance(piece, MediaPlaceholder)
    ]


def _words(processor: Processor, said: Messages) -> list[int]:
    """The answer of a plain sample. Raises DataError if there is not one question with one."""
    if [turn["role"] for turn in said if turn["role"] != "system"] != ["user", "assistant"]:
        raise DataError("template plain takes one question and its answer, without more turns")
    (answer,) = parse(said[-1:], FrameSampling())
    texts = [
        piece
        for part in answer.parts
        if not isinstance(part, MediaPlaceholder)
        for piece in part
        if isinstance(piece, str)
    ]
    return processor.tokenizer.encode("".join(texts) + "\n", special=False)


def in_front(said: Messages) -> Messages:
    """All images before the text of the first question, each leaving `[image 1]`, `[image 2]` ... where it stood.

    The published mixture has this form ("in-the-front"; its mark is not published). As it is stays what has fewer than two
    images, has them in front already or in answers, or has views, whose names say where they belong.
    """
    moved: list[Mapping[str, Any]] = []
    made: list[dict[str, Any]] = []
    behind = False  # whether an image stands after some text
    told = False
    for turn in said:
        parts: list[Mapping[str, Any]] = []
        for part in _pieces(turn["content"]):
            picture = part.get("type") in PICTURES or part == {"type": "text", "text": IMAGE}
            if part.get("type") == "views" or (picture and turn["role"] != "user"):
                return said
            if picture:
                moved.append(part)
                behind |= told
                parts.append({"type": "text", "text": f"[image {len(moved)}]"})
            else:
                told |= turn["role"] == "user" and bool(part["text"].strip())
                parts.append(part)
        made.append({"role": turn["role"], "content": parts})
    if len(moved) < 2 or not behind:
        return said
    first = next(turn for turn in made if turn["role"] == "user")
    for turn in made:
        turn["content"] = "".join(part["text"] for part in turn["content"])
    first["content"] = [*moved, {"type": "text", "text": first["content"]}]
    return made


def _pieces(content: Any) -> Iterator[Mapping[str, Any]]:
    """The parts of a message, each `<image>` in a text a part of its own."""
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part.get("type") != "text":
            yield part
            continue
        for number, text in enumerate(part["text"].split(IMAGE)):
            if number:
                yield {"type": "text", "text": IMAGE}
            if text:
                yield {"type": "text", "text": text}


@dataclass(frozen=True, slots=True)
class PackedSample:
    """What is packed as one: a sample, or the two of a pair. tokens: of it; front: of it with the images in front.

    images: of it, with frames of videos; those of a pair are there once.
    """

    rows: tuple[RawSample, ...]
    tokens: int
    front: int
    images: int

    @property
    def name(self) -> str:
        return self.rows[0].pair or self.rows[0].name


@dataclass(frozen=True, slots=True)
class Samples:
    """Example i: unit number i, counted on through as many passes as are wanted, each in an order of its own.

    references: of pairs, by name, the log-probabilities of both answers under the model that training began with.
    """

    units: Sequence[PackedSample]
    model: Path
    seed: int
    form: SampleFormat = SampleFormat()
    references: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, index: int) -> Prompt | Pair:
        return self.make(*self._drawn(index))

    def length(self, index: int) -> int:
        """Tokens of example i."""
        unit, front = self._drawn(index)
        return unit.front if front else unit.tokens

    def images(self, index: int) -> int:
        """Images and frames of example i."""
        return self._drawn(index)[0].images

    def make(self, unit: PackedSample, front: bool = False) -> Prompt | Pair:
        """Raises DataError naming the sample."""
        processor = formats.processor(self.model)
        try:
            said, media = unit.rows[0].messages()
            if len(unit.rows) == 1:
                return self.form.example(processor, said, media, front=front)
            asked = self.form.question(processor, said, media)
            one, other = (
                _answered(processor, asked, answer)
                for answer in (said[-1], unit.rows[1].messages()[0][-1])
            )
            return Pair(one, other, self.references.get(unit.name, (0.0, 0.0)))
        except LlavaError as error:
            raise DataError(f"sample {unit.name}: {error}") from error

    def _drawn(self, index: int) -> tuple[PackedSample, bool]:
        epoch, number = divmod(index, len(self.units))
        front = (
            self.form.front > 0 and Random(f"front/{self.seed}/{index}").random() < self.form.front
        )
        return self.units[_order(len(self.units), self.seed + epoch)[number]], front


@lru_cache(2)
def _order(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _answered(processor: Processor, asked: Prompt, answer: Mapping[str, Any]) -> Prompt:
    """A question, whose answer has begun, with an answer: tokens apart, so they are those of the whole conversation."""
    told = processor.example([answer], system=None)
    assert told.loss_mask is not None
    begun = told.loss_mask.index(True)
    return Prompt(
        asked.tokens + told.tokens[begun:],
        asked.media,
        [False] * len(asked) + told.loss_mask[begun:],
    )
