"""LLaVA: the tower's features, projected, take the place of the image placeholders in the decoder's
input."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from ..config import EfficientNetConfig, LlavaConfig
from ..image_layout import ImageTokenLayout
from .attention import AttentionFn
from .efficientnet import EfficientNet
from .image_tokens import arrange_features
from .qwen2 import Qwen2
from .siglip import SigLIP


class Projector(nn.Module):
    """Linear, exact GELU, Linear: width of the tower -> width of the decoder."""

    def __init__(self, c: LlavaConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(c.vision.hidden_size, c.projector_hidden_size)
        self.linear_2 = nn.Linear(c.projector_hidden_size, c.text.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(gelu(self.linear_1(x)))


class Llava(nn.Module):
    """Four verbs: `encode` pixels, `embed` tokens and features, `forward` through the decoder,
    `logits` where wanted."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        vision = config.vision
        self.vision_tower: SigLIP | EfficientNet = (
            EfficientNet(vision) if isinstance(vision, EfficientNetConfig) else SigLIP(vision)
        )
        self.multi_modal_projector = Projector(config)
        self.image_newline = (
            nn.Parameter(torch.zeros(config.text.hidden_size))
            if config.arrangement.newline
            else None
        )
        self.language_model = Qwen2(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Share the embedding's weight with the output head where the config ties them; call it
        again after parameters were replaced."""
        if self.config.text.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    def encode(self, pixels: Tensor) -> Tensor:
        """Crops `[N, 3, S, S]` -> projected features `[N, grid * grid, D]`."""
        return self.multi_modal_projector(self.vision_tower(pixels))

    def arrange(self, features: Tensor, layout: ImageTokenLayout) -> Tensor:
        """Features of an image's crops `[crops, grid * grid, D]` as its tokens `[length, D]`."""
        return arrange_features(features, layout, self.image_newline)

    def embed(
        self,
        tokens: Tensor,
        features: Iterable[tuple[int, Tensor]] = (),
        embedding: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Embeddings `[T, D]` of `tokens [T]`; each `(start, rows [n, D])` of `features` replaces
        the rows from `start` on. embedding: called in place of `embed_tokens`."""
        x = (embedding or self.language_model.embed_tokens)(tokens)
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
        """Embeddings `[T, D]` at `positions [T]` -> hidden states `[T, D]`; `attend` computes
        attention."""
        return self.language_model(x, positions, attend)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., D]` -> logits `[..., vocabulary]`."""
        return self.lm_head(hidden)
