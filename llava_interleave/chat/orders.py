"""One question with its images in several orders.

The answer is given whose probability is highest on average over the orders. Models depend on the
order of images (SoFA, arXiv 2503.13792). The images of a question whose order
means nothing are permuted in its prompt; numbers of images in the answers are those of the images
as they were given.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random

from ..errors import OptionError
from ..processing import Tokenizer
from ..prompt import Prompt

ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
)  # fmt: skip
IMAGE = r"(?:images?|pictures?|photos?|photographs?)"
PLACE = re.compile(
    rf"\b(?:{IMAGE}\W{{0,3}}\d+|{'|'.join(ORDINALS)}|last|latter|former|previous|preceding|earlier"
    r"|later|before|after|order|sequence|next(?! to)|(?:dis)?appear\w*|chang(?:e|es|ed|ing)|moved?"
    r")\b",
    re.IGNORECASE,
)
"""Words of a question that depend on the order of the images."""
NUMBERS = re.compile(
    rf"\b{IMAGE}\W{{0,4}}\d+(?:(?:\s*,\s*|\s+and\s+|\s+or\s+)+\d+)*", re.IGNORECASE
)
ORDINAL = re.compile(rf"\b({'|'.join(ORDINALS)})(?=\s+(?:{IMAGE}|one)\b)", re.IGNORECASE)
LIST = re.compile(r"\d+(?:\s*,\s*\d+)+(?=\W*$)")
IN_PARENTHESES = re.compile(r"\(\d+\)")
NUMBERS_OR_PARENTHESES = re.compile(f"{NUMBERS.pattern}|{IN_PARENTHESES.pattern}", re.IGNORECASE)
ASKS_TO_SORT = re.compile(
    rf"\b(?:name|list|sort|rank|arrange)\b.{{0,40}}?\b{IMAGE}\b", re.IGNORECASE | re.DOTALL
)
ASKS_WHICH = re.compile(rf"\bwhich\b.{{0,40}}?\b{IMAGE}\b", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class OrderedAnswer:
    """The answer to one order.

    order: the images as they were given, from 1, in the order that the model saw. text: with the
    images numbered as given. logprob: the sum over its `generated` tokens.
    """

    order: tuple[int, ...]
    text: str
    logprob: float
    generated: int

    @property
    def mean_logprob(self) -> float:
        """Of a token."""
        return self.logprob / max(1, self.generated)


def check(prompt: Prompt, tokenizer: Tokenizer) -> None:
    """Raise `OptionError` where the order of the images may matter.

    Allowed are images in a row, without text between them, and a conversation that does not speak
    of their places. Words in other languages than English are not recognized.
    """
    if len(prompt.media) < 2:
        raise OptionError("orders asks with several images in several orders; attach two or more")
    if any(not one.name.startswith("image ") for one in prompt.media):
        raise OptionError("orders is for images alone: views have names, videos a time")
    for text in _texts(prompt, tokenizer)[1:-1]:
        if text.strip():
            raise OptionError(
                f"orders is for images in a row, but {text.strip()[:60]!r} is between two of them"
            )
    for text in _texts(prompt, tokenizer):
        if found := PLACE.search(text):
            raise OptionError(
                f"orders is for questions that do not depend on the images' order; this one says "
                f"{found[0]!r}"
            )


def _texts(prompt: Prompt, tokenizer: Tokenizer) -> list[str]:
    """What stands before, between and behind the images."""
    ends = [0, *(one.start + one.layout.length for one in prompt.media)]
    starts = [*(one.start for one in prompt.media), len(prompt)]
    return [
        tokenizer.decode(prompt.tokens[end:start]) for end, start in zip(ends, starts, strict=True)
    ]


def permutations(keys: Sequence[bytes], count: int) -> list[tuple[int, ...]]:
    """At most `count` different orders of images with these keys, as indices; the given one first.

    The others are drawn for the set of keys: however the same images are given, these are the same
    sequences of images.
    """
    given = tuple(range(len(keys)))
    by_key = sorted(given, key=lambda i: (keys[i], i))
    seed = blake2b(b"".join(sorted(keys)), digest_size=16).digest()
    rng, found = Random(int.from_bytes(seed, "big")), [given]
    while len(found) < min(count, math.factorial(len(keys))):
        drawn = list(by_key)
        rng.shuffle(drawn)
        if tuple(drawn) not in found:
            found.append(tuple(drawn))
    return found


def reordered(prompt: Prompt, order: Sequence[int]) -> Prompt:
    """The prompt with its images in another order; what is between them stays."""
    ends = [0, *(one.start + one.layout.length for one in prompt.media)]
    tokens: list[int] = []
    media = []
    for place, index in enumerate(order):
        image = prompt.media[index]
        tokens += prompt.tokens[ends[place] : prompt.media[place].start]
        media.append(dataclasses.replace(image, start=len(tokens)))
        tokens += prompt.tokens[image.start : image.start + image.layout.length]
    return Prompt(tokens + prompt.tokens[ends[-1] :], tuple(media))


def as_given(text: str, order: Sequence[int], question: str) -> str:
    """An answer to images in `order`, with its images numbered as they were given.

    "image 2", "images 1 and 3", "the second image"; a number alone where the question asks which
    image, a list of all numbers that ends the answer where it asks to sort the images, and numbers
    in parentheses where those of all images are there: "a cat (1), a dog (2)". Numbers that are no
    image's stay.
    """

    def number(match: re.Match[str]) -> str:
        n = int(match[0])
        return str(order[n - 1] + 1) if 1 <= n <= len(order) else match[0]

    def ordinal(match: re.Match[str]) -> str:
        n = ORDINALS.index(match[0].lower())
        if n >= len(order) or order[n] >= len(ORDINALS):
            return match[0]
        word = ORDINALS[order[n]]
        return word.capitalize() if match[0][0].isupper() else word

    if re.fullmatch(r"\s*\d+\W*", text) and ASKS_WHICH.search(question):
        return re.sub(r"\d+", number, text)
    found = LIST.search(text) if ASKS_TO_SORT.search(question) else None
    if found and {*map(int, re.findall(r"\d+", found[0]))} == {*range(1, len(order) + 1)}:
        return text[: found.start()] + re.sub(r"\d+", number, text[found.start() :])
    listed = {*IN_PARENTHESES.findall(text)} == {f"({n})" for n in range(1, len(order) + 1)}
    pattern = NUMBERS_OR_PARENTHESES if listed else NUMBERS
    text = pattern.sub(lambda match: re.sub(r"\d+", number, match[0]), text)
    return ORDINAL.sub(ordinal, text)


def best(answers: Sequence[OrderedAnswer]) -> int:
    """The index of the answer with the highest probability on average over the orders; an order
    counts for the text that it was answered with.
    """
    sums: dict[str, float] = {}
    for one in answers:
        sums[one.text] = sums.get(one.text, 0.0) + math.exp(one.logprob)
    text = max(sums, key=lambda text: sums[text])
    members = [i for i, one in enumerate(answers) if one.text == text]
    return max(members, key=lambda i: answers[i].logprob)


def question_of(prompt: Prompt, tokenizer: Tokenizer) -> str:
    """What stands behind the last image."""
    return _texts(prompt, tokenizer)[-1]
