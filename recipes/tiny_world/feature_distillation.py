"""Tower and projector learn other drawing styles, and to mark images that are not of the world.

Feature distillation: the target of a scene in any style is the frozen earlier tower's features of
the same scene in the first style, so the decoder understands them at once. All patches of an image
that is not of the world get one and the same feature.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Subset

from llava_interleave.config import VisionConfig
from llava_interleave.model import Llava
from llava_interleave.train.data.packing import Position, prefetch
from llava_interleave.train.losses import Loss

from . import out_of_domain
from .draw import Background, draw, patches
from .episodes import SCENARIOS, episode, reading
from .patch_pretraining import NAMES, LabeledPatches, patch_label
from .styles import plain, restyled

# Images of a batch: scenes in the first style, in other styles, and images of other things.
FIRST_STYLE, OTHER_STYLES, OUT_OF_DOMAIN = 32, 60, 20
PLAIN = 0.3  # of the draws in other styles: shapes of any size at any place of a plain canvas
SPARSE = 0.2  # share of scenes with at most one thing: a bare texture is of the world
CLOSE = 0.1  # a feature is right if its squared error is less than this share of the target's
NAMED = 0.5  # weight of the cross-entropies, relative to the squared error
GROUPS = 3  # of `NAMES`: kind, colour and size; places are the same in every style
PROBE_BATCHES, PROBE_STEPS = 30, 400


@dataclass(frozen=True, slots=True)
class StyledScenes:
    """pixels `[N, 3, S, S]`; references `[M, 3, S, S]`: the first M of them in the first style;
    labels `[M * patches, 6]`, as of `LabeledPatches`."""

    pixels: Tensor
    references: Tensor
    labels: Tensor


class FeatureDistillation:
    """The squared error of features, relative to that of their mean size, summed over patches; and
    the cross-entropies of names that linear classifiers of the earlier tower's features (Alain and
    Bengio 2017, arXiv 1610.01644) read from the new ones: an 8 is close to a 6 in squared error.
    """

    def __init__(self, model: Llava, seed: int, probe: Sequence[LabeledPatches]) -> None:
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        width = model.language_model.embed_tokens.weight.shape[1]
        noise = torch.randn(width, generator=torch.Generator().manual_seed(seed))
        self.direction = noise / noise.norm()
        with torch.no_grad():
            features = torch.cat([self.teacher.encode(b.pixels).flatten(0, 1) for b in probe])
        labels = torch.cat([batch.labels for batch in probe])
        self.size = features.square().sum(-1).mean()
        self.spread = (self.size / width).sqrt()
        self.classifiers = [
            linear_classifier(features / self.spread, labels[:, group], len(NAMES[group]))
            for group in range(GROUPS)
        ]

    def __call__(self, model: Llava, batch: StyledScenes) -> Loss:
        with torch.no_grad():
            targets = self.teacher.encode(batch.references).float()
        others = len(batch.pixels) - len(targets)
        marked = (self.direction * self.size.sqrt()).expand(others, targets.shape[1], -1)
        features = model.encode(batch.pixels).float()
        shares = (features - torch.cat([targets, marked])).square().sum(-1) / self.size
        total = shares.sum()
        scenes = features[: len(targets)].flatten(0, 1) / self.spread
        for classify, labels in zip(self.classifiers, batch.labels.T, strict=False):
            scores = classify(scenes[labels >= 0])
            total = total + NAMED * cross_entropy(scores, labels[labels >= 0], reduction="sum")
        return Loss(total, shares.numel(), int((shares < CLOSE).sum()))


def linear_classifier(features: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """A classifier of features `[N, D]`, frozen; labels `[N]`, -1 where there is none."""
    features, labels = features[labels >= 0], labels[labels >= 0]
    rng = torch.Generator().manual_seed(0)
    layer = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02, weight_decay=1e-3)
    for _ in range(PROBE_STEPS):
        some = torch.randint(len(labels), (2048,), generator=rng)
        optimizer.zero_grad()
        cross_entropy(layer(features[some]), labels[some]).backward()
        optimizer.step()
    return layer.requires_grad_(False)


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
        labels: list[tuple[int, ...]] = []
        while len(first) < FIRST_STYLE + OTHER_STYLES:
            image = None
            if len(first) > FIRST_STYLE and rng.random() < PLAIN:
                ep, image = plain(rng)
                scenes = list(ep.scenes)
            else:
                kind = rng.choice((*SCENARIOS, "single", "reading", "reading"))
                ep = (
                    episode(kind, rng)
                    if kind in SCENARIOS
                    else reading(rng, Background.sample(rng))
                )
                scenes = rng.sample(ep.scenes, min(2, len(ep.scenes)))
                if rng.random() < SPARSE:
                    scenes = [replace(s, things=s.things[: rng.randint(0, 1)]) for s in scenes]
            drawn = [Image.fromarray(draw(scene, size * rng.choice((1, 2)))) for scene in scenes]
            first += drawn
            for scene in scenes:
                seen = patches(scene, size, self.vision.patch_size)
                labels += [patch_label(place, thing) for place, thing in enumerate(seen)]
            if image is not None:
                styled.append(image)
            elif len(first) <= FIRST_STYLE:
                styled += drawn
            else:
                styled += restyled(rng, replace(ep, scenes=tuple(scenes)))
        first, styled = first[: FIRST_STYLE + OTHER_STYLES], styled[: FIRST_STYLE + OTHER_STYLES]
        others = [out_of_domain.image(rng, self.folder) for _ in range(OUT_OF_DOMAIN)]
        labels = labels[: len(first) * self.vision.grid**2]
        return StyledScenes(
            to_tensor(styled + others, size), to_tensor(first, size), torch.tensor(labels)
        )


def batches(
    vision: VisionConfig, folder: Path, seed: int, steps: int, workers: int, start: Position
) -> Iterator[tuple[StyledScenes, Position]]:
    """Batches from `start.window` on, made in worker processes."""
    data = Subset(StyledScenesDataset(vision, folder, seed, steps), range(start.window, steps))
    for index, batch in enumerate(prefetch(data, None, workers), start.window):
        yield batch, Position(index + 1)
