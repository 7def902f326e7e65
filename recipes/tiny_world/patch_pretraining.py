"""Before answering there is naming: tower and projector learn to say, in the decoder's own words, what lies under each patch.

It stands in for the pre-training with language that SigLIP had.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.utils.data import Dataset, Subset

from llava_interleave.config import VisionConfig
from llava_interleave.model import Llava
from llava_interleave.model.siglip import Layer
from llava_interleave.processing.tokenizer import Tokenizer
from llava_interleave.train.losses import Loss
from llava_interleave.train.packing import Position, prefetch

from .draw import COLOURS, DIGITS, LETTERS, SHAPES, SOLIDS, Background, Scene, Thing, draw, patches
from .episodes import COLUMNS, DEPTHS, ROWS, SCENARIOS, episode, reading, stands

NAMES = (
    ("nothing", *SHAPES, *SOLIDS, *DIGITS, *LETTERS),
    tuple(COLOURS),
    ("small", "large"),
    ROWS,
    COLUMNS,
    DEPTHS,
)
PICTURES = 128
DIRECTION = 3.0  # weight of the cosine beside the cross-entropies


@dataclass(frozen=True, slots=True)
class Named:
    """pixels `[N, 3, S, S]`; labels `[N * patches, 6]`: kind (0 is nothing), colour, size, row, column and depth,
    numbered as in `NAMES`; -1 where there is none."""

    pixels: Tensor
    labels: Tensor

    @property
    def known(self) -> Tensor:
        """Which of the labels say something."""
        return self.labels >= 0


class Naming:
    """The loss of naming. A name's vector is the mean of the embeddings of its tokens, as a first word and after a space.

    A feature is to name, and to point along the sum of its names' vectors: with the names alone a circle is told from a ball by
    little, and a question that asks for the circle finds both.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        names = [name for group in NAMES for name in group]
        self.words = torch.zeros(len(names), tokenizer.size)
        for row, name in zip(self.words, names, strict=True):
            tokens = [t for text in (name, f" {name}") for t in tokenizer.encode(text)]
            for token in tokens:
                row[token] += 1 / len(tokens)

    def vectors(self, model: Llava) -> list[Tensor]:
        """Vectors `[names, D]` of each group of names."""
        table = model.language_model.embed_tokens.weight
        return list(
            (self.words.to(table) @ table[: self.words.shape[1]]).split(
                [len(group) for group in NAMES]
            )
        )

    def __call__(self, model: Llava, batch: Named) -> Loss:
        """Cross-entropy of each name that a patch has, and the cosine."""
        features, vectors = model.encode(batch.pixels).flatten(0, 1), self.vectors(model)
        total = (
            1 - cosine_similarity(features.float(), self.meant(vectors, batch))
        ).sum() * DIRECTION
        right = torch.ones(len(features), dtype=torch.bool)
        for names, labels, counts in zip(vectors, batch.labels.T, batch.known.T, strict=True):
            scores = (features @ names.T).float()
            total = total + cross_entropy(scores[counts], labels[counts], reduction="sum")
            right &= (scores.argmax(-1) == labels) | ~counts
        return Loss(total, len(features), int(right.sum()))

    def meant(self, vectors: list[Tensor], batch: Named) -> Tensor:
        """`[N * patches, D]`: the sums of the vectors that features stand for."""
        return sum(
            (
                v[at] * n[:, None]
                for v, at, n in zip(vectors, batch.labels.T, batch.known.T, strict=True)
            ),
            torch.zeros(()),
        )

    @torch.no_grad()
    def calibrate(self, model: Llava, batch: Named) -> None:
        """Scale tower and projector so that features of things are as large as the sums they stand for; what they say stays.

        Each layer normalises what it reads, so a trained tower's residual stream and features may have any size. Unscaled they
        are hundreds of times as large as embeddings and drown what the decoder adds to them.
        """
        size = model.vision_tower(batch.pixels).square().mean().sqrt()
        sight = model.vision_tower
        writers: list[nn.Module] = [
            sight.embeddings.patch_embedding,
            sight.embeddings.position_embedding,
        ]
        for layer in sight.encoder.layers:
            assert isinstance(layer, Layer)
            writers += [layer.self_attn.out_proj, layer.mlp.fc2]
        for writer in writers:
            for p in writer.parameters():
                p.div_(size)
        model.multi_modal_projector.linear_1.weight.mul_(size)
        there = batch.labels[:, 0] > 0
        features, meant = (
            model.encode(batch.pixels).flatten(0, 1)[there],
            self.meant(self.vectors(model), batch)[there],
        )
        for p in model.multi_modal_projector.linear_2.parameters():
            p.mul_((features * meant).sum() / features.square().sum())


def label(place: int, thing: Thing | None) -> tuple[int, ...]:
    """The names of a patch; of a solid thing the column is that where it stands."""
    row, column = divmod(place, len(COLUMNS))
    if thing is None:
        return 0, -1, -1, row, column, -1
    depth = -1
    if thing.kind in SOLIDS:
        column, depth = stands(thing)
    return (
        NAMES[0].index(thing.kind),
        NAMES[1].index(thing.colour),
        int(thing.large),
        row,
        column,
        depth,
    )


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
            kind = rng.choice((*SCENARIOS, "reading", "reading"))  # characters are many and rare
            found = (
                reading(rng, Background.sample(rng)) if kind == "reading" else episode(kind, rng)
            ).scenes
            scenes += rng.sample(found, min(3, len(found)))
        scenes = scenes[:PICTURES]
        pixels = torch.stack([torch.from_numpy(draw(scene, size)) for scene in scenes]).permute(
            0, 3, 1, 2
        )
        labels = [
            label(*found)
            for scene in scenes
            for found in enumerate(patches(scene, size, self.vision.patch_size))
        ]
        return Named((pixels.float() / 255 - 0.5) / 0.5, torch.tensor(labels))


def pictures(
    vision: VisionConfig, seed: int, steps: int, start: Position
) -> Iterator[tuple[Named, Position]]:
    """Batches from `start.window` on, prepared in a worker process."""
    data = Subset(Pictures(vision, seed, steps), range(start.window, steps))
    for index, batch in enumerate(prefetch(data, None, 1), start.window):
        yield batch, Position(index + 1)
