"""Attribution of an answer to its images: leave-one-out log-probabilities and attention heat maps.

Computed by the model's own forward, next to the engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError, PromptError
from ..image_layout import ImageTokenLayout
from ..model import AttentionFn, AttentionRecorder, Llava, PackedAttention
from ..prompt import Media, Prompt
from . import report

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..processing.images import ImageSettings

CROPS_PER_CALL, ROWS_PER_CALL = 8, 64
"""Crops per call of the vision tower; rows whose logits are in memory at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageAttribution:
    """An image, a view or a whole video, and its part in an answer.

    name: its label, as `Chatbot.estimate` has it.
    change: by how many nats the answer's log-probability falls without it; None if not computed.
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


class AttributionRun:
    """Forward passes over a prompt with its answer; the images are encoded once.

    The row before an answer's token predicts it, so the answer's last token is not an input and the
    answer's rows are the last `len(answer)` ones.

    check_cancelled: called before each pass; it may raise.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Llava,
        prompt: Prompt,
        answer: Sequence[int],
        vocab: int,
        check_cancelled: Callable[[], None] = lambda: None,
    ) -> None:
        check_cancelled()
        weight = model.language_model.norm.weight
        self.model, self.prompt, self.vocab = model, prompt, vocab
        self.check_cancelled = check_cancelled
        self.answer = torch.tensor(list(answer), device=weight.device)
        spans = []
        for media in prompt.media:
            starts = range(0, media.layout.crops, CROPS_PER_CALL)
            parts = (media.pixels_of(start, start + CROPS_PER_CALL) for start in starts)
            features = torch.cat(
                [model.encode(part.to(weight.device, weight.dtype)) for part in parts]
            )
            spans.append((media.start, model.arrange(features, media.layout)))
        tokens = torch.tensor([*prompt.tokens, *answer[:-1]], device=weight.device)
        self.x = model.embed(tokens, spans)
        self.positions = torch.arange(len(self.x), device=weight.device)

    def logprobs(self, attend: AttentionFn, x: Tensor, positions: Tensor) -> Tensor:
        """Log-probability of each token of the answer `[A]` for inputs `x [T, D]`.

        As in the engine, over the tokens that can be generated.
        """
        self.check_cancelled()
        hidden = self.model.forward(x, positions, attend)[-len(self.answer) :]
        logprobs = []
        calls = zip(hidden.split(ROWS_PER_CALL), self.answer.split(ROWS_PER_CALL), strict=True)
        for rows, tokens in calls:
            logits = self.model.logits(rows)[:, : self.vocab].float()
            for placeholder in self.model.config.placeholder_ids:
                logits[:, placeholder : placeholder + 1] = -torch.inf
            logprobs.append(logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
        return torch.cat(logprobs)

    def with_attention(self, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[A]`; the answer's attention `[A, T]`, mean over layers and heads."""
        recorder = AttentionRecorder(len(self.x), len(self.x) - len(self.answer), layers)
        logprobs = self.logprobs(recorder, self.x, self.positions)
        return logprobs, torch.stack([recorder.recorded[layer] for layer in layers]).mean(0)

    def without(self, *media: Media) -> Tensor:
        """Log-probabilities `[A]` where nothing attends to these media; all positions stay.

        Under causal attention that is the same as removing their rows.
        """
        rows = torch.ones(len(self.x), dtype=torch.bool, device=self.x.device)
        for one in media:
            rows[one.start : one.start + one.layout.length] = False
        return self.logprobs(PackedAttention([int(rows.sum())]), self.x[rows], self.positions[rows])


def count_tokens(prompt: Prompt, answer_tokens: int, leave_out: bool) -> int:
    """Tokens of all forward passes of `attribute`: with all images, without any, without each."""
    lengths = [media.layout.length for media in prompt.media]
    whole = len(prompt) + answer_tokens
    each = sum(whole - length for length in lengths) if leave_out else 0
    return 2 * whole - sum(lengths) + each


@torch.inference_mode()
def attribute(
    run: AttributionRun, settings: ImageSettings, layers: Sequence[int], leave_out: bool
) -> tuple[float, tuple[ImageAttribution, ...]]:
    """The answer's log-probability and each media's part in it.

    Two forward passes, and with `leave_out` one more per media. The answer's tokens are weighted by
    how much the images raise their log-probability: an end token, or the rest of a word, needs no
    image.
    """
    media = run.prompt.media
    logprobs, attention = run.with_attention(layers)
    gains = normalize((logprobs - run.without(*media)).tolist())
    weighted = torch.tensor(gains, device=attention.device) @ attention
    weights = [weighted[m.start : m.start + m.layout.length] for m in media]
    masses = [float(part.sum()) for part in weights]
    logprob = float(logprobs.sum())
    per_token: list[Tensor] | list[None] = [None] * len(media)
    shares: list[float] | list[None] = [None] * len(media)
    if leave_out:
        per_token = [logprobs - run.without(m) for m in media]
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
    if any(media.layout.share < 1 for media in prompt.media):
        raise OptionError(
            "attribution needs every image token: "
            "ask and attribute without image_token_ratio and video_token_ratio"
        )
    if not answer:
        raise PromptError("the answer has no tokens, so there is nothing to attribute")
    if len(prompt) + len(answer) > context:
        raise PromptError(
            f"the prompt has {len(prompt)} tokens and the answer {len(answer)}, "
            f"but the context is {context}: shorten the answer"
        )


def last_question(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last user message; " … " stands for the media between its texts."""
    content = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    if isinstance(content, str):
        return content
    return " … ".join(part["text"].strip() for part in content if part.get("type") == "text")
