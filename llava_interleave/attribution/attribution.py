"""Attribution of an answer to its images: leave-one-out log-probabilities and attention heat maps.

Computed by the model's own forward, next to the engine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError, PromptError
from ..image_layout import ImageTokenLayout
from ..prompt import Media, Prompt
from . import report
from .forward import AttributionRun

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..processing.images import ImageSettings

LeaveOut = bool | Literal["exact"]
"""How images are left out: True hides an image from the tokens behind all images, which are
computed again; "exact" from all tokens; False: none is left out."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageAttribution:
    """An image, a view or a whole video, and its part in an answer.

    name: its label, as `Chatbot.estimate` has it.
    change: by how many nats the answer's log-probability falls without it; None if not computed.
        What later images took from it stays unless `leave_out` is "exact".
    token_changes: the same for each token of the answer, `[A]` float32, whose sum is `change`.
    share: its part of the sum of all decreases; 0 if the log-probability rises; None as `change`.
    attention: its share of the answer's attention to images.
    heat: `[frames, side, side]` float32, that attention per token; the sum over all images is 1.
        `frames` is 1 for an image, `side` its tokens per side.
    pixels: `[frames, S, S, 3]` uint8, as the vision tower receives them, without tiles.
    """

    name: str
    change: float | None
    token_changes: NDArray[np.float32] | None
    share: float | None
    attention: float
    heat: NDArray[np.float32]
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Attribution:
    """The result of `Chatbot.attribute`; `dataclasses.asdict` makes it plain data.

    layers: the decoder layers whose attention was recorded, from 0.
    logprob: natural log-probability of the whole answer.
    """

    question: str
    answer: str
    layers: tuple[int, ...]
    logprob: float
    images: tuple[ImageAttribution, ...]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained HTML page. Raises `DataError` if the file cannot be written."""
        report.write(path, self)


def count_tokens(prompt: Prompt, answer_tokens: int, leave_out: LeaveOut) -> int:
    """Tokens of all forward passes of `attribute` at most: with all images, without any, and what
    is computed again without each."""
    lengths = [media.layout.length for media in prompt.media]
    ends = [media.start + media.layout.length for media in prompt.media]
    whole = len(prompt) + answer_tokens
    each = 0
    if leave_out == "exact":
        each = sum(whole - end for end in ends)
    elif leave_out:
        each = len(ends) * (whole - max(ends))
    return 2 * whole - sum(lengths) + each


@torch.inference_mode()
def attribute(
    run: AttributionRun, settings: ImageSettings, layers: Sequence[int], leave_out: LeaveOut
) -> tuple[float, tuple[ImageAttribution, ...]]:
    """The answer's log-probability and each media's part in it.

    The answer's tokens are weighted by how much the images raise their log-probability: an end
    token, or the rest of a word, needs no image.
    """
    media = run.prompt.media
    logprobs, attention = run.with_attention(layers)
    gains = normalize((logprobs - run.without(media)).tolist())
    weighted = torch.tensor(gains, device=attention.device) @ attention
    weights = [weighted[m.start : m.start + m.layout.length] for m in media]
    masses = [float(part.sum()) for part in weights]
    logprob = float(logprobs.sum())
    per_token: list[Tensor] | list[None] = [None] * len(media)
    shares: list[float] | list[None] = [None] * len(media)
    if leave_out:
        left_out = (
            [run.without([m]) for m in media]
            if leave_out == "exact"
            else run.directly_without([[m] for m in media])
        )
        per_token = [logprobs - one for one in left_out]
        shares = normalize([float(one.sum()) for one in per_token])
    return logprob, tuple(
        ImageAttribution(
            name=m.label,
            change=None if one is None else float(one.sum()),
            token_changes=None if one is None else one.float().cpu().numpy(),
            share=share,
            attention=fraction,
            heat=(to_heatmap(part, m.layout) / (sum(masses) or 1.0)).cpu().numpy(),
            pixels=denormalize(m, settings),
        )
        for m, one, share, fraction, part in zip(
            media, per_token, shares, normalize(masses), weights, strict=True
        )
    )


def normalize(values: Sequence[float]) -> list[float]:
    """Positive values divided by their sum, negative ones 0; equal parts if none is positive."""
    positive = [max(value, 0.0) for value in values]
    total = sum(positive)
    return [x / total for x in positive] if total > 0 else [1 / len(positive)] * len(positive)


def to_heatmap(weights: Tensor, layout: ImageTokenLayout) -> Tensor:
    """Weights of a media's tokens `[layout.length]` as maps `[frames, side, side]`.

    Those of tiles are added to the whole image at the place they show; newlines show nothing.
    """
    side = layout.side
    if layout.keep is None:
        if layout.newline == "row":
            return weights.unflatten(0, (layout.crops, side, side + 1))[..., :-1]
        if layout.newline == "frame":
            weights = weights.unflatten(0, (layout.crops, -1))[:, :-1].flatten()
        elif layout.newline == "end":
            weights = weights[:-1]
        return weights.unflatten(0, (layout.crops, side, side))
    height, width = layout.window
    rows, columns = (
        (2 * torch.arange(n, device=weights.device) + 1) * side // (2 * n) for n in (height, width)
    )
    whole = weights[: side**2].unflatten(0, (side, side))
    tiles = weights[side**2 :].unflatten(0, (height, -1))[:, :width]
    return whole.index_put((rows[:, None], columns), tiles, accumulate=True)[None]


def denormalize(media: Media, settings: ImageSettings) -> NDArray[np.uint8]:
    """The images that the vision tower receives, `[frames, S, S, 3]`: `ImageSettings` inverted."""
    crops = media.pixels if media.layout.tiles is None else media.pixels_of(0, 1)
    mean, std = (np.array(values, np.float32) for values in (settings.mean, settings.std))
    values = (crops.permute(0, 2, 3, 1).numpy() * std + mean) / settings.rescale
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def resolve_layers(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The layers to record of `count`; default: the middle third (docs/decisions.md)."""
    if layers is None:
        return tuple(range(count // 3, max(2 * count // 3, count // 3 + 1)))
    if not layers or not all(type(layer) is int and 0 <= layer < count for layer in layers):
        raise OptionError(
            f"layers are whole numbers from 0 to {count - 1}, at least one, not {list(layers)!r}"
        )
    return tuple(sorted(set(layers)))


def check(prompt: Prompt, answer: Sequence[int], context: int) -> None:
    """Raises `PromptError` or `OptionError` where no attribution is possible."""
    if not prompt.media:
        raise PromptError(
            f"attribution needs an image; the prompt has {len(prompt)} tokens of text and no image"
        )
    check_layouts(prompt)
    if not answer:
        raise PromptError("the answer has no tokens, so there is nothing to attribute")
    if len(prompt) + len(answer) > context:
        raise PromptError(
            f"the prompt has {len(prompt)} tokens and the answer {len(answer)}, "
            f"but the context is {context}: shorten the answer"
        )


def check_layouts(prompt: Prompt) -> None:
    """Raises `OptionError` for a prompt without some of its images' tokens."""
    if any(media.layout.share < 1 for media in prompt.media):
        raise OptionError(
            "attribution and citations need every image token: "
            "ask without image_token_ratio and video_token_ratio"
        )


def last_question(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last user message; " … " stands for the media between its texts."""
    content = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    if isinstance(content, str):
        return content
    return " … ".join(part["text"].strip() for part in content if part.get("type") == "text")
