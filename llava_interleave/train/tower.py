"""Before the language model there is sight: the tower learns to name what lies under each patch of the world's pictures.

It stands in for the pre-training that SigLIP had. The head that names is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset

from ..config import VisionConfig
from ..model.vision import SigLIP
from ..world.draw import COLOURS, DIGITS, LETTERS, SHAPES, SOLIDS, Scene, Thing, draw, patches
from ..world.episodes import SCENARIOS, episode
from .batch import Position
from .loss import Loss

KINDS = (*SHAPES, *SOLIDS, *DIGITS, *LETTERS)
PICTURES = 128


class Naming(nn.Module):
    """A tower and three linear readings of each patch: kind (or nothing), colour, size."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.vision_tower = SigLIP(c)
        self.norm = nn.LayerNorm(c.hidden_size)
        self.head = nn.Linear(c.hidden_size, len(KINDS) + 1 + len(COLOURS) + 2)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels `[N, 3, S, S]` -> logits of kind, colour and size, each `[N * patches, classes]`."""
        scores = self.head(self.norm(self.vision_tower(pixels).flatten(0, 1))).float()
        kind, colour, size = scores.split([len(KINDS) + 1, len(COLOURS), 2], dim=-1)
        return kind, colour, size


@dataclass(frozen=True, slots=True)
class Named:
    """pixels `[N, 3, S, S]`; labels `[N * patches, 3]`: kind (0 is nothing), colour, size."""

    pixels: Tensor
    labels: Tensor


def naming(model: Naming, batch: Named) -> Loss:
    """Cross-entropy of the kind under every patch, and of colour and size where there is something."""
    kind, colour, size = model(batch.pixels)
    labels, there = batch.labels, batch.labels[:, 0] > 0
    total = cross_entropy(kind, labels[:, 0], reduction="sum")
    total = total + cross_entropy(colour[there], labels[there, 1], reduction="sum")
    total = total + cross_entropy(size[there], labels[there, 2], reduction="sum")
    return Loss(total, len(labels), int((kind.argmax(-1) == labels[:, 0]).sum()))


def label(thing: Thing | None) -> tuple[int, int, int]:
    if thing is None:
        return 0, 0, 0
    return KINDS.index(thing.kind) + 1, list(COLOURS).index(thing.colour), int(thing.large)


class Pictures(Dataset[Named]):
    """Batch k: pictures of the world, drawn with lots from `seed` and k."""

    def __init__(self, vision: VisionConfig, seed: int, count: int) -> None:
        self.vision, self.seed, self.count = vision, seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Named:
        rng, size = Random(f"see/{self.seed}/{index}"), self.vision.image_size
        scenes: list[Scene] = []
        while len(scenes) < PICTURES:
            found = episode(rng.choice(SCENARIOS), rng).scenes
            scenes += rng.sample(found, min(3, len(found)))
        scenes = scenes[:PICTURES]
        pixels = torch.stack([torch.from_numpy(draw(scene, size)) for scene in scenes]).permute(0, 3, 1, 2)
        labels = [label(thing) for scene in scenes for thing in patches(scene, size, self.vision.patch_size)]
        return Named((pixels.float() / 255 - 0.5) / 0.5, torch.tensor(labels))


def pictures(vision: VisionConfig, seed: int, steps: int, start: Position) -> Iterator[tuple[Named, Position]]:
    """Batches from `start.window` on, prepared in a worker process."""
    data = Subset(Pictures(vision, seed, steps), range(start.window, steps))
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for index, batch in enumerate(loader, start.window):
        yield batch, Position(index + 1)
