"""Which image an answer leaned on: each one's share of it, and what in it was attended to. Computed beside the engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError, PromptError
from ..image_layout import ImageTokenLayout
from ..model import AttentionFn, AttentionRecorder, Llava, PackedAttention, arrange_features
from ..prompt import Media, Prompt
from . import report

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..processing.images import ImageSettings

CROPS, ROWS = 8, 64
"""Crops in a call of the tower, and rows whose logits are held at once."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageAttribution:
    """An image, a view or a whole video, and its part in an answer.

    name: as `Chatbot.estimate` names it.
    change: by how many nats the answer's log-probability falls when it is taken out of the prompt; None where this was left out.
    share: of the falls of all; what makes the answer likelier by its absence has 0; None as `change`.
    attention: of what the answer's tokens attend to in images, the share that is here; the cheap variant.
    heat: `[pictures, side, side]` float32, where in it, `side` its tokens a side; over all images it sums to one. A video has a
        map a frame.
    pictures: `[pictures, S, S, 3]` uint8, as the tower was given them; of an image cut into tiles the whole one.
    """

    name: str
    change: float | None
    share: float | None
    attention: float
    heat: NDArray[np.float32]
    pictures: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Attribution:
    """What an answer leaned on, as `Chatbot.explain` found it; `dataclasses.asdict` makes it plain.

    layers: whose attention is told, from 0. logprob: natural log-probability of the whole answer.
    """

    question: str
    answer: str
    layers: tuple[int, ...]
    logprob: float
    images: tuple[ImageAttribution, ...]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as one HTML page that needs nothing else. Raises `DataError` where that cannot be written."""
        report.write(path, self)


class AttributionRun:
    """A prompt with an answer, ready to go through the network once more in one piece.

    The row of the token before an answer's token is the one that predicts it, so the answer's last token is never read and
    the answer's rows are the last `len(answer)` ones.
    """

    @torch.inference_mode()
    def __init__(self, model: Llava, prompt: Prompt, answer: Sequence[int], vocab: int) -> None:
        weight = model.language_model.norm.weight
        self.model, self.prompt, self.vocab = model, prompt, vocab
        self.answer = torch.tensor(list(answer), device=weight.device)
        spans = [
            (
                media.start,
                arrange_features(
                    torch.cat([model.encode(part) for part in crops.split(CROPS)]), media.layout
                ),
            )
            for media, crops in (
                (media, media.pixels.to(weight.device, weight.dtype)) for media in prompt.media
            )
        ]
        self.x = model.embed(
            torch.tensor([*prompt.tokens, *answer[:-1]], device=weight.device), spans
        )
        self.positions = torch.arange(len(self.x), device=weight.device)

    def logprobs(self, attend: AttentionFn, x: Tensor, positions: Tensor) -> Tensor:
        """Log-probability of each token of the answer `[A]` by rows `x [T, D]`, as the engine counts: of what it may write."""
        hidden = self.model.forward(x, positions, attend)[-len(self.answer) :]
        found = []
        for rows, tokens in zip(hidden.split(ROWS), self.answer.split(ROWS), strict=True):
            logits = self.model.logits(rows)[:, : self.vocab].float()
            if (image := self.model.config.image_token_id) < self.vocab:
                logits[:, image] = -torch.inf
            found.append(logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
        return torch.cat(found)

    def recorded(self, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[A]`, and what the answer's rows attend to `[A, T]`: the mean of the layers and their heads."""
        attend = AttentionRecorder(len(self.x), len(self.x) - len(self.answer), layers)
        found = self.logprobs(attend, self.x, self.positions)
        return found, torch.stack([attend.kept[layer] for layer in layers]).mean(0)

    def without(self, *taken: Media) -> Tensor:
        """Log-probabilities `[A]` where nothing attends to the tokens of these media, all others keeping their positions.

        Under causal attention that is the same as leaving out their rows.
        """
        kept = torch.ones(len(self.x), dtype=torch.bool, device=self.x.device)
        for media in taken:
            kept[media.start : media.start + media.layout.length] = False
        return self.logprobs(PackedAttention([int(kept.sum())]), self.x[kept], self.positions[kept])


@torch.inference_mode()
def attribute(
    trial: AttributionRun,
    settings: ImageSettings,
    layers: Sequence[int],
    leave_out: bool,
) -> tuple[float, tuple[ImageAttribution, ...]]:
    """The answer's log-probability and each media's part in it: one forward, one of the text alone, with `leave_out` one a media.

    Rows of the answer count by how much likelier the images make their tokens: an end, or the rest of a word, needs none.
    """
    media = trial.prompt.media
    found, attention = trial.recorded(layers)
    rows = torch.tensor(
        normalize((found - trial.without(*media)).tolist()), device=attention.device
    )
    inside = [rows @ attention[:, m.start : m.start + m.layout.length] for m in media]
    logprob = float(found.sum())
    masses = [float(part.sum()) for part in inside]
    changes = [logprob - float(trial.without(m).sum()) for m in media] if leave_out else None
    falls = normalize(changes) if changes else None
    return logprob, tuple(
        ImageAttribution(
            name=m.label,
            change=changes[index] if changes else None,
            share=falls[index] if falls else None,
            attention=share,
            heat=(to_heatmap(inside[index], m.layout) / (sum(masses) or 1.0)).cpu().numpy(),
            pictures=shown(m, settings),
        )
        for index, (m, share) in enumerate(zip(media, normalize(masses), strict=True))
    )


def normalize(values: Sequence[float]) -> list[float]:
    """Values above 0 by their sum; where there are none, all alike."""
    above = [max(value, 0.0) for value in values]
    total = sum(above)
    return [value / total for value in above] if total > 0 else [1 / len(above)] * len(above)


def to_heatmap(weights: Tensor, layout: ImageTokenLayout) -> Tensor:
    """Weights of a media's tokens `[layout.length]` as maps `[pictures, side, side]`: those of tiles go onto the whole image."""
    side = layout.side
    if layout.keep is None:
        return weights.unflatten(0, (layout.crops, side, side))
    height, width = layout.keep[2:]
    rows, columns = (
        (2 * torch.arange(n, device=weights.device) + 1) * side // (2 * n) for n in (height, width)
    )
    whole, tiles = (
        weights[: side**2].unflatten(0, (side, side)),
        weights[side**2 :].unflatten(0, (height, width)),
    )
    return whole.index_put((rows[:, None], columns), tiles, accumulate=True)[None]


def shown(media: Media, settings: ImageSettings) -> NDArray[np.uint8]:
    """The pictures that the tower was given, `[pictures, S, S, 3]`: `ImageSettings.table` backwards."""
    crops = media.pixels if media.layout.tiles is None else media.pixels[:1]
    mean, std = (np.array(values, np.float32) for values in (settings.mean, settings.std))
    values = (crops.permute(0, 2, 3, 1).numpy() * std + mean) / settings.rescale
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def resolve_layers(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The layers to record, of a decoder of `count`; without a choice its middle third (see docs/decisions.md)."""
    if layers is None:
        return tuple(range(count // 3, max(2 * count // 3, count // 3 + 1)))
    if not layers or not all(type(layer) is int and 0 <= layer < count for layer in layers):
        raise OptionError(
            f"layers are whole numbers from 0 to {count - 1}, at least one, not {list(layers)!r}"
        )
    return tuple(sorted(set(layers)))


def check(prompt: Prompt, answer: Sequence[int], context: int) -> None:
    """Raises `PromptError` or `OptionError` for what has no explanation."""
    if not prompt.media:
        raise PromptError(
            f"the prompt has {len(prompt)} tokens of text and no image: only answers about images are explained"
        )
    if any(media.layout.share < 1 for media in prompt.media):
        raise OptionError(
            "maps need every token of an image: ask and explain without image_token_ratio and video_token_ratio"
        )
    if not answer:
        raise PromptError("the answer has no tokens, so there is nothing to explain")
    if len(prompt) + len(answer) > context:
        raise PromptError(
            f"the prompt has {len(prompt)} tokens and the answer {len(answer)}, but the context is {context}: shorten the answer"
        )


def last_question(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last question, dots where something else stands in between."""
    content = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    return (
        content
        if isinstance(content, str)
        else " … ".join(part["text"].strip() for part in content if part.get("type") == "text")
    )
