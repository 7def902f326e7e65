"""LLaVA: the tower's features, projected, take the place of the image placeholders in the decoder's input."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, gelu, normalize

from ..config import LlavaConfig
from ..image_layout import ImageTokenLayout
from .attention import AttentionFn
from .qwen2 import Qwen2
from .siglip import SigLIP


class Projector(nn.Module):
    """Linear, exact GELU, Linear: tower width -> decoder width."""

    def __init__(self, c: LlavaConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(c.vision.hidden_size, c.text.hidden_size)
        self.linear_2 = nn.Linear(c.text.hidden_size, c.text.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(gelu(self.linear_1(x)))


class Llava(nn.Module):
    """Four verbs: `encode` pixels, `embed` tokens and features, `forward` through the decoder, `logits` where wanted."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = SigLIP(config.vision)
        self.multi_modal_projector = Projector(config)
        self.language_model = Qwen2(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make the output head the embedding itself where the config says so; again after parameters were replaced."""
        if self.config.text.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    def encode(self, pixels: Tensor) -> Tensor:
        """Crops `[N, 3, S, S]` -> projected features `[N, grid * grid, D]`."""
        return self.multi_modal_projector(self.vision_tower(pixels))

    def embed(self, tokens: Tensor, features: Iterable[tuple[int, Tensor]] = ()) -> Tensor:
        """Embeddings `[T, D]` of `tokens [T]`; each `(start, rows [n, D])` of `features` replaces rows from `start` on."""
        x = self.language_model.embed_tokens(tokens)
        spans = sorted(features, key=lambda span: span[0])
        if not spans:
            return x
        parts, end = [], 0
        for start, rows in spans:
            assert end <= start and start + len(rows) <= len(x), (end, start, len(rows), len(x))
            parts += [x[end:start], rows.to(x.dtype)]
            end = start + len(rows)
        return torch.cat([*parts, x[end:]])

    def forward(self, x: Tensor, positions: Tensor, attend: AttentionFn) -> Tensor:
        """Embeddings `[T, D]` at `positions [T]` -> hidden states `[T, D]`; `attend` decides what sees what."""
        return self.language_model(x, positions, attend)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., D]` -> logits `[..., vocabulary]`."""
        return self.lm_head(hidden)


def arrange_features(features: Tensor, layout: ImageTokenLayout) -> Tensor:
    """Features of a media's crops `[crops, grid * grid, D]` in the order of its tokens, `[layout.length, D]`."""
    assert features.shape[:2] == (layout.crops, layout.grid**2)
    side = layout.side
    if layout.pool > 1:
        squares = features.unflatten(1, (layout.grid, layout.grid)).permute(0, 3, 1, 2)
        features = avg_pool2d(squares, layout.pool, ceil_mode=True).flatten(2).transpose(1, 2)
    if layout.tiles is None or layout.keep is None:
        return divprune(features, layout.length // layout.crops).flatten(0, 1)
    rows, columns = layout.tiles
    top, left, height, width = layout.keep
    tiled = (
        features[1:].unflatten(1, (side, side)).unflatten(0, (rows, columns)).permute(0, 2, 1, 3, 4)
    )
    tiled = tiled.reshape(rows * side, columns * side, -1)[top : top + height, left : left + width]
    return divprune(torch.cat([features[0], tiled.flatten(0, 1)])[None], layout.length)[0]


def divprune(features: Tensor, count: int) -> Tensor:
    """Of `[N, T, D]` the `count` of each T that differ most from each other, by angle, in their order: `[N, count, D]`.

    First the one that is farthest from its nearest, then each time the one that is farthest from all that are chosen.
    Source: DivPrune, Alvar et al. 2025, arXiv 2503.02175.
    """
    n, tokens = features.shape[:2]
    if count == tokens:
        return features
    sight, each = (
        normalize(features.detach().float(), dim=-1),
        torch.arange(n, device=features.device),
    )
    apart = 1 - sight @ sight.transpose(1, 2)
    chosen = torch.zeros(n, tokens, dtype=torch.bool, device=features.device)
    nearest = (apart + 4 * torch.eye(tokens, device=features.device)).amin(-1)
    for number in range(count):
        best = nearest.masked_fill(chosen, -1).argmax(-1)
        chosen[each, best] = True
        nearest = torch.minimum(nearest, apart[each, best]) if number else apart[each, best]
    return features[chosen].unflatten(0, (n, count))
