"""Which image an answer used: attribution with a token budget, cancelled when the client leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from ..attribution.attribution import (
    LeaveOut,
    attribute,
    check,
    check_layouts,
    count_tokens,
    normalize,
    resolve_layers,
)
from ..attribution.citations import cite, cite_text, count_citation_tokens, split_sentences
from ..attribution.forward import AttributionRun, CachedPrompt
from ..chat import Answer, Chatbot, ImageAttribution
from ..errors import OptionError, PromptError
from ..prompt import Prompt
from .openai_types import (
    AttributionMode,
    AttributionResponse,
    ImageAttributionInfo,
    ImageCitation,
    SentenceAttribution,
)

MAX_ANSWER_TOKENS = 1024
"""Attention of each answer token is held in memory for a third of the layers."""


def check_attribution_budget(
    prompt: Prompt,
    n: int,
    answer_tokens: int,
    mode: AttributionMode | Literal[False],
    citations: bool,
    budget: int,
) -> None:
    """Raises PromptError or OptionError where `n` such answers need more than `budget` tokens.

    mode: of attribution; False: only citations. The tokens of all forward passes count, as if
    nothing of the prompt was cached.
    """
    if mode and not prompt.media:
        raise PromptError("attribution needs an image or a video in the messages; leave it out")
    check_layouts(prompt)
    what = "attribution" if mode else "cite"
    if answer_tokens > MAX_ANSWER_TOKENS:
        raise OptionError(
            f"{what} is limited to answers of {MAX_ANSWER_TOKENS} tokens, not "
            f"{answer_tokens}: set max_completion_tokens"
        )
    count = count_tokens(prompt, answer_tokens, leave_out(mode)) if mode else 0
    count += count_citation_tokens(prompt, answer_tokens) if citations else 0
    if n * count > budget:
        raise OptionError(
            f"{what} needs {n * count:,} tokens through the model; the limit is {budget:,}: use "
            + ("attribution: 'attention', " if mode in (True, "exact") else "")
            + "fewer images or frames, fewer answers, or fewer max_completion_tokens"
        )


def leave_out(mode: AttributionMode) -> LeaveOut:
    """What `attribute` does in this mode."""
    return mode is True if mode != "exact" else "exact"


def attribute_prompt(
    bot: Chatbot,
    prompt: Prompt,
    answer: Sequence[int],
    mode: AttributionMode,
    check_cancelled: Callable[[], None],
    cached: CachedPrompt,
) -> AttributionResponse:
    """The attribution of an answer; heat maps are rounded to 4 digits."""
    text = bot.model.config.text
    check(prompt, answer, text.context)
    layers = resolve_layers(None, text.num_layers)
    size = bot.processor.tokenizer.size
    run = AttributionRun(bot.model, prompt, answer, size, check_cancelled, cached)
    logprob, images = attribute(run, bot.processor.images, layers, leave_out(mode))
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


def cite_prompt(
    bot: Chatbot,
    prompt: Prompt,
    answer: Answer,
    check_cancelled: Callable[[], None],
    cached: CachedPrompt,
) -> list[ImageCitation]:
    """The citations of an answer."""
    tokens = [bot.processor.tokenizer.token_bytes(token) for token in answer.tokens]
    if prompt.media:
        size = bot.processor.tokenizer.size
        run = AttributionRun(bot.model, prompt, answer.tokens, size, check_cancelled, cached)
        citations = cite(run, tokens, answer.text)
    else:
        citations = cite_text(tokens, answer.text)
    return [
        ImageCitation(
            start_index=one.start,
            end_index=one.end,
            images=list(one.images),
            changes=list(one.changes),
            uncertain=one.uncertain,
        )
        for one in citations
    ]


def sentence_attributions(
    tokens: Sequence[bytes], images: Sequence[ImageAttribution]
) -> list[SentenceAttribution] | None:
    """The answer's sentences and lines, with the change of each; None if no image was left out."""
    if images[0].token_changes is None:
        return None
    found = []
    for sentence in split_sentences(tokens):
        tokens_of = slice(sentence.first, sentence.last)
        changes = [float(image.token_changes[tokens_of].sum()) for image in images]  # type: ignore[index]
        found.append(
            SentenceAttribution(text=sentence.text, changes=changes, shares=normalize(changes))
        )
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
