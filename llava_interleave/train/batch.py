"""Training examples become flat batches: whole samples, packed by best fit, nothing cut and nothing dropped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

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
        return positions(self.lengths)


def positions(lengths: Sequence[int]) -> Tensor:
    """Of the tokens of samples that lie one after another, counted anew in each."""
    return torch.cat([torch.arange(n) for n in lengths])


@dataclass(frozen=True, slots=True)
class Pair:
    """A conversation with two last answers, which alone carry loss, and their log-probabilities under the reference."""

    chosen: Prompt
    rejected: Prompt
    reference: tuple[float, float]

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Several pairs: chosen, rejected, chosen, rejected ... one after another. As `Batch`, but pictures are there once a pair.

    media: (first placeholder in chosen, first placeholder in rejected, layout). reference: `[P, 2]`.
    """

    tokens: Tensor
    learn: Tensor
    lengths: list[int]
    pixels: Tensor
    media: list[tuple[int, int, Layout]]
    reference: Tensor


def collate_pairs(pairs: Sequence[Pair]) -> Pairs:
    """Lay pairs one after another."""
    whole = collate([prompt for pair in pairs for prompt in (replace(pair.chosen, media=()), replace(pair.rejected, media=()))])
    media: list[tuple[int, int, Layout]] = []
    begin = 0
    for pair in pairs:
        second = begin + len(pair.chosen)
        media += [(begin + m.start, second + m.start, m.layout) for m in pair.chosen.media]
        begin += len(pair)
    pixels = [m.pixels for pair in pairs for m in pair.chosen.media]
    return Pairs(
        whole.tokens,
        whole.learn,
        whole.lengths,
        torch.cat(pixels) if pixels else whole.pixels,
        media,
        torch.tensor([pair.reference for pair in pairs]),
    )


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


class Windows(Dataset[list[Any]]):
    """Window k: the samples k * size … (k + 1) * size - 1, packed into batches in an order that `seed` and k decide.

    Prompts become a `Batch`, pairs become `Pairs`.
    """

    def __init__(self, example: Callable[[int], Prompt | Pair], count: int, *, size: int, tokens: int, seed: int) -> None:
        self.example, self.count, self.size, self.tokens, self.seed = example, count, size, tokens, seed

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __getitem__(self, window: int) -> list[Batch | Pairs]:
        first = window * self.size
        samples = [self.example(i) for i in range(first, min(first + self.size, self.count))]
        groups = pack([len(sample) for sample in samples], self.tokens)
        Random(f"{self.seed}/{window}").shuffle(groups)
        return [join([samples[i] for i in group]) for group in groups]


def join(samples: Sequence[Prompt | Pair]) -> Batch | Pairs:
    """Lay samples of one kind one after another."""
    pairs = [sample for sample in samples if isinstance(sample, Pair)]
    return collate_pairs(pairs) if pairs else collate([sample for sample in samples if isinstance(sample, Prompt)])


def obey(_: int) -> None:
    """A terminal sends Ctrl-C, and many a batch system SIGTERM, to workers too: whoever trains decides what the first means, and
    the second ends them without an error, which would be raised there in the middle of a step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def batches(windows: Windows, start: Position, *, workers: int) -> Iterator[tuple[Any, Position]]:
    """Batches from `start` on, each with the position after it; prepared ahead in worker processes."""
    loader = DataLoader(
        Subset(windows, range(start.window, len(windows))),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=obey,
    )
    for window, group in enumerate(loader, start.window):
        for index, batch in enumerate(group):
            if window > start.window or index >= start.batch:
                last = index + 1 == len(group)
                yield batch, Position(window + 1, 0) if last else Position(window, index + 1)
