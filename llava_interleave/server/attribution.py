"""Which image an answer used: attribution with a token budget, cancelled when the client leaves."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

from ..attribution.attribution import (
    AttributionRun,
    attribute,
    check,
    count_tokens,
    normalize,
    resolve_layers,
)
from ..chat import Chatbot, ImageAttribution
from ..errors import OptionError, PromptError
from ..prompt import Prompt
from .openai_types import (
    AttributionMode,
    AttributionResponse,
    ImageAttributionInfo,
    SentenceAttribution,
)

MAX_ANSWER_TOKENS = 1024
"""Attention of each answer token is held in memory for a third of the layers."""
SENTENCE_END = re.compile(rb"(?<=[.!?:;])\s+|\n+")


def check_attribution_budget(
    prompt: Prompt, n: int, answer_tokens: int, mode: AttributionMode, budget: int
) -> None:
    """Raises PromptError or OptionError where `n` such answers need more than `budget` tokens.

    The tokens of all forward passes count: one of everything, one without images, one without each
    image.
    """
    if not prompt.media:
        raise PromptError("attribution needs an image or a video in the messages; leave it out")
    if answer_tokens > MAX_ANSWER_TOKENS:
        raise OptionError(
            f"attribution is limited to answers of {MAX_ANSWER_TOKENS} tokens, not "
            f"{answer_tokens}: set max_completion_tokens"
        )
    count = count_tokens(prompt, answer_tokens, mode is True)
    if n * count > budget:
        raise OptionError(
            f"attribution needs {n * count:,} tokens through the model; the limit is {budget:,}: "
            + ("use attribution: 'attention', " if mode is True else "use ")
            + "fewer images or frames, fewer answers, or fewer max_completion_tokens"
        )


def attribute_prompt(
    bot: Chatbot,
    prompt: Prompt,
    answer: Sequence[int],
    mode: AttributionMode,
    check_cancelled: Callable[[], None],
) -> AttributionResponse:
    """The attribution of an answer; heat maps are rounded to 4 digits."""
    text = bot.model.config.text
    check(prompt, answer, text.context)
    layers = resolve_layers(None, text.num_layers)
    size = bot.processor.tokenizer.size
    run = AttributionRun(bot.model, prompt, answer, size, check_cancelled)
    logprob, images = attribute(run, bot.processor.images, layers, mode is True)
    return AttributionResponse(
        layers=list(layers),
        logprob=logprob,
        images=[
            _image_info(media.name, image)
            for media, image in zip(prompt.media, images, strict=True)
        ],
        sentences=sentence_attributions(
            [bot.processor.tokenizer.token_bytes(t) for t in answer], images
        ),
    )


def sentence_attributions(
    tokens: Sequence[bytes], images: Sequence[ImageAttribution]
) -> list[SentenceAttribution] | None:
    """The answer's sentences and lines, with the change of each; None if no image was left out.

    A token belongs to the sentence of its last byte, so that a space counts with its word.
    """
    if images[0].token_changes is None:
        return None
    text = b"".join(tokens)
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    starts = [0, *(end for end in ends if end < len(text))]
    found, at, first = [], 0, 0
    for start, stop in pairwise([*starts, len(text)]):
        last = first
        while last < len(tokens) and at + len(tokens[last]) <= stop:
            at += len(tokens[last])
            last += 1
        changes = [float(image.token_changes[first:last].sum()) for image in images]  # type: ignore[index]
        found.append(
            SentenceAttribution(
                text=text[start:stop].decode("utf-8", "replace"),
                changes=changes,
                shares=normalize(changes),
            )
        )
        first = last
    return found


def _image_info(name: str, image: ImageAttribution) -> ImageAttributionInfo:
    return ImageAttributionInfo(
        name=name,
        share=image.share,
        change=image.change,
        attention=image.attention,
        heat=[
            [[float(f"{value:.4g}") for value in row] for row in rows]
            for rows in image.heat.tolist()
        ],
    )
