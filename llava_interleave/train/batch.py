"""Training examples become flat batches: whole samples, packed by best fit, nothing cut and nothing dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..errors import DataError
from ..layout import Layout
from ..prompt import Prompt


@dataclass(frozen=True, slots=True)
class Batch:
    """Several samples, one after another.

    tokens: `[T]` ids with expanded placeholders; learn: `[T]` which of them carry loss; lengths: tokens a sample.
    pixels: `[N, 3, S, S]` crops of all media; media: (index of the first placeholder, layout) of each, in the order of the crops.
    """

    tokens: Tensor
    learn: Tensor
    lengths: list[int]
    pixels: Tensor
    media: list[tuple[int, Layout]]

    @property
    def positions(self) -> Tensor:
        """`[T]`, counted anew in each sample."""
        return torch.cat([torch.arange(n) for n in self.lengths])


def collate(prompts: Sequence[Prompt]) -> Batch:
    """Lay prompts one after another."""
    tokens: list[int] = []
    learn: list[bool] = []
    media: list[tuple[int, Layout]] = []
    for prompt in prompts:
        assert prompt.learn is not None
        media += [(len(tokens) + m.start, m.layout) for m in prompt.media]
        tokens += prompt.tokens
        learn += prompt.learn
    pixels = [m.pixels for prompt in prompts for m in prompt.media]
    return Batch(
        torch.tensor(tokens),
        torch.tensor(learn),
        [len(p) for p in prompts],
        torch.cat(pixels) if pixels else torch.empty(0, 3, 1, 1),
        media,
    )


def pack(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of samples grouped so that no group is longer than `limit` tokens: best fit, longest first.

    Raises DataError for a sample that is longer than `limit` by itself.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > limit:
            raise DataError(
                f"sample {index} has {lengths[index]:,} tokens, more than the {limit:,} of a batch: raise `tokens` or shorten it"
            )
        fits = [g for g in range(len(groups)) if room[g] >= lengths[index]]
        if fits:
            best = min(fits, key=lambda g: room[g])
            groups[best].append(index)
            room[best] -= lengths[index]
        else:
            groups.append([index])
            room.append(limit - lengths[index])
    return groups


@dataclass(frozen=True, slots=True)
class Position:
    """How far the data have been read: the next batch is number `batch` of window number `window`."""

    window: int = 0
    batch: int = 0


class Windows(Dataset[list[Batch]]):
    """Window k: the samples k * size … (k + 1) * size - 1, packed into batches in an order that `seed` and k decide."""

    def __init__(self, example: Callable[[int], Prompt], count: int, *, size: int, tokens: int, seed: int) -> None:
        self.example, self.count, self.size, self.tokens, self.seed = example, count, size, tokens, seed

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __getitem__(self, window: int) -> list[Batch]:
        first = window * self.size
        prompts = [self.example(i) for i in range(first, min(first + self.size, self.count))]
        groups = pack([len(p) for p in prompts], self.tokens)
        Random(f"{self.seed}/{window}").shuffle(groups)
        return [collate([prompts[i] for i in group]) for group in groups]


def batches(windows: Windows, start: Position, *, workers: int) -> Iterator[tuple[Batch, Position]]:
    """Batches from `start` on, each with the position after it; prepared ahead in worker processes."""
    loader = DataLoader(
        Subset(windows, range(start.window, len(windows))),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="spawn" if workers else None,
    )
    for window, group in enumerate(loader, start.window):
        for index, batch in enumerate(group):
            if window > start.window or index >= start.batch:
                last = index + 1 == len(group)
                yield batch, Position(window + 1, 0) if last else Position(window, index + 1)
