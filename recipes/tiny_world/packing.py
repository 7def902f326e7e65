"""Packed batches of samples whose lengths are known only after they are made: window by window;
and a run over batches with its report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from random import Random
from typing import Any

from torch import nn
from torch.utils.data import Dataset, Subset

from llava_interleave.train import report
from llava_interleave.train.data.packing import Position, pack, prefetch
from llava_interleave.train.loop import train
from llava_interleave.train.recipe import Recipe


class PackedDataset(Dataset[list[Any]]):
    """Window k: samples k * size ... (k + 1) * size - 1, packed into batches and shuffled.

    collate: makes a batch of samples.
    """

    def __init__(
        self,
        example: Callable[[int], Sized],
        count: int,
        *,
        size: int,
        tokens: int,
        seed: int,
        collate: Callable[[Sequence[Any]], Any],
    ) -> None:
        self.example, self.count, self.size, self.tokens, self.seed = (
            example,
            count,
            size,
            tokens,
            seed,
        )
        self.collate = collate

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __getitem__(self, window: int) -> list[Any]:
        first = window * self.size
        samples: list[Any] = [
            self.example(i) for i in range(first, min(first + self.size, self.count))
        ]
        groups = pack([len(sample) for sample in samples], self.tokens)
        Random(f"{self.seed}/{window}").shuffle(groups)
        return [self.collate([samples[i] for i in group]) for group in groups]


def batches(
    windows: PackedDataset, start: Position, *, workers: int
) -> Iterator[tuple[Any, Position]]:
    """Batches from `start` on, each with the position after it; prefetched by worker processes."""
    for window, group in enumerate(
        prefetch(Subset(windows, range(start.window, len(windows))), None, workers), start.window
    ):
        for index, batch in enumerate(group):
            if window > start.window or index >= start.batch:
                last = index + 1 == len(group)
                yield batch, Position(window + 1, 0) if last else Position(window, index + 1)


def train_reported(
    model: nn.Module,
    loss: Any,
    data: Callable[[Position], Iterator[tuple[Any, Position]]],
    recipe: Recipe,
    folder: Path,
) -> None:
    """`train`, then the recipe as config.toml and the run as report.html in `folder`."""
    train(model, loss, data, recipe, folder)
    (folder / "config.toml").write_text(recipe.toml())
    report.write(folder, folder / "report.html")
