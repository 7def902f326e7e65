"""Which image an answer leaned on, as `Chatbot.explain` finds it, for prompts that have been made and clients that may leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from ..attribution.attribution import AttributionRun, attribute, check, resolve_layers
from ..chat import Chatbot, ImageAttribution
from ..errors import OptionError, PromptError
from ..prompt import Prompt

How = Literal[True, "attention"]
"""All of it, or the cheap variant, which takes no image out."""
LONGEST = 1024
"""Tokens of an explained answer: what each attends to is held in memory for a third of the layers."""


class CancellableAttributionRun(AttributionRun):
    """A trial that asks before each pass through the network whether it is still wanted; `wanted` raises where it is not."""

    def __init__(
        self, bot: Chatbot, prompt: Prompt, answer: Sequence[int], wanted: Callable[[], None]
    ) -> None:
        wanted()
        self.wanted = wanted
        super().__init__(bot.model, prompt, answer, bot.processor.tokenizer.size)

    def logprobs(self, *args: Any) -> Tensor:
        self.wanted()
        return super().logprobs(*args)


def check_attribution_budget(
    prompt: Prompt, answers: int, tokens: int, how: How, most: int
) -> None:
    """Raises PromptError or OptionError where answers of so many tokens have no explanation, or a longer one than `most`.

    Counted are the tokens that go through the network: once all, once without any image, and once without each.
    """
    if not prompt.media:
        raise PromptError(
            "explain tells which image an answer leaned on, but the messages have none: leave it out"
        )
    if tokens > LONGEST:
        raise OptionError(
            f"explain takes answers of at most {LONGEST} tokens, not {tokens}: give max_completion_tokens"
        )
    lengths = [media.layout.length for media in prompt.media]
    whole = len(prompt) + tokens
    count = (
        2 * whole - sum(lengths) + (sum(whole - length for length in lengths) if how is True else 0)
    )
    if answers * count > most:
        raise OptionError(
            f"explain would take {answers * count:,} tokens through the network; the limit is {most:,}: "
            + ("ask for explain: 'attention', " if how is True else "use ")
            + "fewer images or frames, fewer answers, or fewer max_completion_tokens"
        )


def attribution_json(
    bot: Chatbot,
    prompt: Prompt,
    answer: Sequence[int],
    how: How,
    wanted: Callable[[], None],
) -> dict[str, Any]:
    """The explanation of an answer as JSON has it. In `heat` 4 digits count."""
    text = bot.model.config.text
    check(prompt, answer, text.context)
    layers = resolve_layers(None, text.num_layers)
    trial = CancellableAttributionRun(bot, prompt, answer, wanted)
    logprob, images = attribute(trial, bot.processor.images, layers, how is True)
    found = [_image(media.name, look) for media, look in zip(prompt.media, images, strict=True)]
    return {"layers": list(layers), "logprob": logprob, "images": found}


def _image(name: str, look: ImageAttribution) -> dict[str, Any]:
    heat = [
        [[float(f"{value:.4g}") for value in row] for row in rows] for rows in look.heat.tolist()
    ]
    return {
        "name": name,
        "share": look.share,
        "change": look.change,
        "attention": look.attention,
        "heat": heat,
    }
