"""Tower and projector learn other drawing styles, and to mark images that are not of the world.

Feature distillation: the target of a scene in any style is the frozen earlier tower's features of
the same scene in the first style, so the decoder understands them at once. All patches of an image
that is not of the world get one and the same feature.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from llava_interleave.config import VisionConfig
from llava_interleave.model import Llava
from llava_interleave.train.data.packing import Position, prefetch
from llava_interleave.train.losses import Loss

from . import out_of_domain
from .draw import Background, draw
from .episodes import SCENARIOS, episode, reading
from .styles import restyled

# Images of a batch: scenes in the first style, in other styles, and images of other things.
FIRST_STYLE, OTHER_STYLES, OUT_OF_DOMAIN = 8, 20, 28
CLOSE = 0.1  # a feature is right if its squared error is less than this share of the target's


@dataclass(frozen=True, slots=True)
class StyledScenes:
    """pixels `[N, 3, S, S]`; references `[M, 3, S, S]`: the first M of them in the first style."""

    pixels: Tensor
    references: Tensor


class FeatureDistillation:
    """The squared error of features, relative to that of their mean size; summed over patches."""

    def __init__(self, model: Llava, seed: int) -> None:
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        width = model.language_model.embed_tokens.weight.shape[1]
        noise = torch.randn(width, generator=torch.Generator().manual_seed(seed))
        self.direction = noise / noise.norm()

    def __call__(self, model: Llava, batch: StyledScenes) -> Loss:
        with torch.no_grad():
            targets = self.teacher.encode(batch.references).float()
        size = targets.square().sum(-1).mean()
        others = len(batch.pixels) - len(targets)
        marked = (self.direction * size.sqrt()).expand(others, targets.shape[1], -1)
        errors = model.encode(batch.pixels).float() - torch.cat([targets, marked])
        shares = errors.square().sum(-1) / size
        return Loss(shares.sum(), shares.numel(), int((shares < CLOSE).sum()))


def to_tensor(images: list[Image.Image], size: int) -> Tensor:
    """Images `[N, 3, size, size]` as the processor makes them."""
    squashed = [image.resize((size, size), Image.Resampling.BICUBIC) for image in images]
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in squashed])
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


class StyledScenesDataset(Dataset[StyledScenes]):
    """Batch k, drawn from `seed` and k. folder: of images that are not of the world."""

    def __init__(self, vision: VisionConfig, folder: Path, seed: int, count: int) -> None:
        self.vision, self.folder, self.seed, self.count = vision, folder, seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> StyledScenes:
        rng, size = Random(f"styles/{self.seed}/{index}"), self.vision.image_size
        styled: list[Image.Image] = []
        first: list[Image.Image] = []
        while len(first) < FIRST_STYLE + OTHER_STYLES:
            kind = rng.choice((*SCENARIOS, "single", "reading"))
            ep = reading(rng, Background.sample(rng)) if kind == "reading" else episode(kind, rng)
            scenes = rng.sample(ep.scenes, min(2, len(ep.scenes)))
            drawn = [Image.fromarray(draw(scene, size * rng.choice((1, 2)))) for scene in scenes]
            first += drawn
            plain = len(first) <= FIRST_STYLE
            styled += drawn if plain else restyled(rng, replace(ep, scenes=tuple(scenes)))
        first, styled = first[: FIRST_STYLE + OTHER_STYLES], styled[: FIRST_STYLE + OTHER_STYLES]
        others = [out_of_domain.image(rng, self.folder) for _ in range(OUT_OF_DOMAIN)]
        return StyledScenes(to_tensor(styled + others, size), to_tensor(first, size))


def batches(
    vision: VisionConfig, folder: Path, seed: int, steps: int, workers: int, start: Position
) -> Iterator[tuple[StyledScenes, Position]]:
    """Batches from `start.window` on, made in worker processes."""
    data = Subset(StyledScenesDataset(vision, folder, seed, steps), range(start.window, steps))
    for index, batch in enumerate(prefetch(data, None, workers), start.window):
        yield batch, Position(index + 1)
