"""Pre-training of tower and projector: the feature of each patch names the patch's content, in the
decoder's word embeddings. It replaces SigLIP's pre-training with language.
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
from llava_interleave.model.siglip import Layer, SigLIP
from llava_interleave.processing.tokenizer import Tokenizer
from llava_interleave.train.data.packing import Position, prefetch
from llava_interleave.train.losses import Loss

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
BATCH_IMAGES = 128
COSINE_WEIGHT = 3.0  # of the cosine, relative to the cross-entropies


@dataclass(frozen=True, slots=True)
class LabeledPatches:
    """pixels `[N, 3, S, S]`; labels `[N * patches, 6]`: kind (0 is nothing), colour, size, row,
    column and depth, numbered as in `NAMES`; -1 where there is none."""

    pixels: Tensor
    labels: Tensor

    @property
    def label_mask(self) -> Tensor:
        """True where there is a label."""
        return self.labels >= 0


class PatchNamingLoss:
    """Cross-entropy of the names of each patch, and the cosine with the sum of their vectors.

    A name's vector is the mean of the embeddings of its tokens, as a first word and after a space.
    With the cross-entropy alone, features of a circle and a ball differ little, and a question
    about the circle finds both.
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

    def __call__(self, model: Llava, batch: LabeledPatches) -> Loss:
        """The sum over patches; a patch is right if all its names are."""
        features, vectors = model.encode(batch.pixels).flatten(0, 1), self.vectors(model)
        total = (
            1 - cosine_similarity(features.float(), self.target_features(vectors, batch))
        ).sum() * COSINE_WEIGHT
        correct = torch.ones(len(features), dtype=torch.bool)
        for names, labels, mask in zip(vectors, batch.labels.T, batch.label_mask.T, strict=True):
            scores = (features @ names.T).float()
            total = total + cross_entropy(scores[mask], labels[mask], reduction="sum")
            correct &= (scores.argmax(-1) == labels) | ~mask
        return Loss(total, len(features), int(correct.sum()))

    def target_features(self, vectors: list[Tensor], batch: LabeledPatches) -> Tensor:
        """`[N * patches, D]`: the sums of the vectors of the patches' names."""
        return sum(
            (
                v[at] * n[:, None]
                for v, at, n in zip(vectors, batch.labels.T, batch.label_mask.T, strict=True)
            ),
            torch.zeros(()),
        )

    @torch.no_grad()
    def calibrate(self, model: Llava, batch: LabeledPatches) -> None:
        """Scale tower and projector so that features of things are as large as their targets.

        Layers normalize their inputs, so a trained tower's residual stream and features may have
        any size. Unscaled they are hundreds of times as large as embeddings, and the decoder's
        additions to them are lost. Directions stay the same.
        """
        size = float(model.vision_tower(batch.pixels).square().mean().sqrt())
        scale(model, residual=1 / size)
        there = batch.labels[:, 0] > 0
        features, targets = (
            model.encode(batch.pixels).flatten(0, 1)[there],
            self.target_features(self.vectors(model), batch)[there],
        )
        scale(model, features=float((features * targets).sum() / features.square().sum()))


@torch.no_grad()
def scale(model: Llava, *, residual: float = 1.0, features: float = 1.0) -> None:
    """Scale what the tower's layers add to its residual stream, with the same result, and the
    projector's features."""
    tower, projector = model.vision_tower, model.multi_modal_projector
    assert isinstance(tower, SigLIP)
    writers: list[nn.Module] = [
        tower.embeddings.patch_embedding,
        tower.embeddings.position_embedding,
    ]
    for layer in tower.encoder.layers:
        assert isinstance(layer, Layer)
        writers += [layer.self_attn.out_proj, layer.mlp.fc2]
    for p in (p for writer in writers for p in writer.parameters()):
        p.mul_(residual)
    projector.linear_1.weight.div_(residual)
    for p in projector.linear_2.parameters():
        p.mul_(features)


def patch_label(place: int, thing: Thing | None) -> tuple[int, ...]:
    """The label of a patch; the column of a solid thing is where it stands."""
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


class LabeledPatchesDataset(Dataset[LabeledPatches]):
    """Batch k: images of the world, drawn from `seed` and k."""

    def __init__(self, vision: VisionConfig, seed: int, count: int) -> None:
        self.vision, self.seed, self.count = vision, seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> LabeledPatches:
        rng, size = Random(f"see/{self.seed}/{index}"), self.vision.image_size
        scenes: list[Scene] = []
        while len(scenes) < BATCH_IMAGES:
            kind = rng.choice((*SCENARIOS, "reading", "reading"))  # characters are many and rare
            if kind == "reading":
                drawn = reading(rng, Background.sample(rng)).scenes
            else:
                drawn = episode(kind, rng).scenes
            scenes += rng.sample(drawn, min(3, len(drawn)))
        scenes = scenes[:BATCH_IMAGES]
        images = torch.stack([torch.from_numpy(draw(scene, size)) for scene in scenes])
        labels = [
            patch_label(place, thing)
            for scene in scenes
            for place, thing in enumerate(patches(scene, size, self.vision.patch_size))
        ]
        pixels = images.permute(0, 3, 1, 2).float()
        return LabeledPatches((pixels / 255 - 0.5) / 0.5, torch.tensor(labels))


def batches(
    vision: VisionConfig, seed: int, steps: int, start: Position
) -> Iterator[tuple[LabeledPatches, Position]]:
    """Batches from `start.window` on, made in a worker process."""
    data = Subset(LabeledPatchesDataset(vision, seed, steps), range(start.window, steps))
    for index, batch in enumerate(prefetch(data, None, 1), start.window):
        yield batch, Position(index + 1)
