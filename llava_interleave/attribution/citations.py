"""Citations: the images that each sentence of an answer rests on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ..prompt import Prompt
from .forward import AttributionRun

SENTENCE_END = re.compile(rb"(?<=[.!?])\s+|\n+")
MIN_NATS = 1.0
"""The log-probability that a sentence loses without an image it cites, at least."""
MIN_PART = 0.5
"""The same as a part of the largest loss without any image."""
COUNTS_OR_COMPARES = re.compile(
    r"\d|\b(one|two|three|four|five|six|seven|eight|nine|ten|most|fewest|least|more|fewer|less|than|"
    r"both|all|none|neither|either|same|different|difference|every|only|first|last|change[ds]?)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Citation:
    """A sentence or line of an answer, and the images it rests on.

    start, end: of the sentence in the answer's text. images: numbers of the cited images and
    videos, from 1 in the order of the messages; empty if the sentence needs no image: it follows
    from the text.
    changes: by image, the nats of log-probability that the sentence loses where it cannot see the
    image. uncertain: of several images, and the sentence seems to count or compare: the tokens
    of later images may have taken up what it needs.
    """

    text: str
    start: int
    end: int
    images: tuple[int, ...]
    changes: tuple[float, ...]
    uncertain: bool


@dataclass(frozen=True, slots=True)
class Sentence:
    """Characters `start` to `end` of an answer's text, from its tokens `first` to `last`."""

    text: str
    start: int
    end: int
    first: int
    last: int


def split_sentences(tokens: Sequence[bytes]) -> list[Sentence]:
    """The sentences and lines of an answer. They join to its text, and their tokens to its tokens.

    A token belongs to the sentence of its last byte, so that a space counts with its word.
    """
    text = b"".join(tokens)
    starts = [0, *(match.end() for match in SENTENCE_END.finditer(text) if match.end() < len(text))]
    sentences: list[Sentence] = []
    at, first, begin = 0, 0, 0
    for start, stop in pairwise([*starts, len(text)]):
        last = first
        while last < len(tokens) and at + len(tokens[last]) <= stop:
            at += len(tokens[last])
            last += 1
        words = text[start:stop].decode("utf-8", "replace")
        sentences.append(Sentence(words, begin, begin + len(words), first, last))
        first, begin = last, begin + len(words)
    return sentences


def cite(run: AttributionRun, tokens: Sequence[bytes], text: str) -> tuple[Citation, ...]:
    """The citations of an answer with this text.

    An image is cited where the sentence loses at least a nat, and half of the largest loss, without
    it. Where no single image is needed but one of several is, those are cited that alone give as
    much.
    """
    media = run.prompt.media
    blind = run.without(media)
    whole, *hidden = run.directly_without([[], *([one] for one in media)])
    changes = [whole - one for one in hidden]
    sentences = [one for one in split_sentences(tokens) if one.start < len(text)]
    alone: list[Tensor] = []
    citations = []
    for sentence in sentences:
        tokens_of = slice(sentence.first, sentence.last)
        lost = [float(one[tokens_of].sum()) for one in changes]
        cited = _decisive(lost)
        gain = float((whole - blind)[tokens_of].sum())
        if not cited and len(media) > 1 and gain >= MIN_NATS:
            if not alone:
                others = [[m for m in media if m is not one] for one in media]
                none, *alone = run.directly_without([media, *others])
                alone = [one - none for one in alone]
            cited = _decisive([float(one[tokens_of].sum()) for one in alone])
        end = min(sentence.end, len(text))
        citations.append(
            Citation(
                text[sentence.start : end],
                sentence.start,
                end,
                tuple(cited),
                tuple(lost),
                len(media) > 1 and COUNTS_OR_COMPARES.search(sentence.text) is not None,
            )
        )
    return tuple(citations)


def cite_text(tokens: Sequence[bytes], text: str) -> tuple[Citation, ...]:
    """The citations of an answer to a prompt without images: none needs one."""
    return tuple(
        Citation(text[one.start : one.end], one.start, min(one.end, len(text)), (), (), False)
        for one in split_sentences(tokens)
        if one.start < len(text)
    )


def mark(text: str, citations: Sequence[Citation]) -> str:
    """The text with the numbers of the cited images behind each sentence."""
    parts, at = [], 0
    for citation in citations:
        words = text[at : citation.end].rstrip()
        numbers = f" [{', '.join(map(str, citation.images))}]" if citation.images else ""
        parts += [words, numbers, text[at + len(words) : citation.end]]
        at = citation.end
    return "".join([*parts, text[at:]])


def count_citation_tokens(prompt: Prompt, answer_tokens: int) -> int:
    """Tokens of all forward passes of `cite` at most."""
    if not prompt.media:
        return 0
    ends = [media.start + media.layout.length for media in prompt.media]
    whole = len(prompt) + answer_tokens
    text = whole - sum(media.layout.length for media in prompt.media)
    return whole + text + (2 * len(ends) + 1) * (whole - max(ends))


def _decisive(changes: Sequence[float]) -> list[int]:
    """Numbers, from 1, of the images whose change counts."""
    least = max(MIN_NATS, MIN_PART * max(changes))
    return [number for number, change in enumerate(changes, 1) if change >= least]
