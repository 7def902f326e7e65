"""Training examples become flat batches: whole samples, packed by best fit, nothing cut and nothing dropped."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import resource_tracker
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..distributed.process_group import ProcessGroup
from ..errors import DataError
from ..image_layout import ImageTokenLayout
from ..prompt import Prompt


@dataclass(frozen=True, slots=True)
class Batch:
    """Several samples, one after another.

    tokens: `[T]` ids with expanded placeholders; loss_mask: `[T]` which of them carry loss; lengths: tokens a sample.
    pixels: `[N, 3, S, S]` crops of all media; media: (index of the first placeholder, layout) of each, in the order of the crops.
    """

    tokens: Tensor
    loss_mask: Tensor
    lengths: list[int]
    pixels: Tensor
    media: list[tuple[int, ImageTokenLayout]]

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
    loss_mask: Tensor
    lengths: list[int]
    pixels: Tensor
    media: list[tuple[int, int, ImageTokenLayout]]
    reference: Tensor


@dataclass(frozen=True, slots=True)
class DummyBatch:
    """A batch that a rank computes so that the others need not wait for it, and that counts nothing."""

    batch: Batch | Pairs


def collate_pairs(pairs: Sequence[Pair]) -> Pairs:
    """Lay pairs one after another."""
    whole = collate(
        [
            prompt
            for pair in pairs
            for prompt in (replace(pair.chosen, media=()), replace(pair.rejected, media=()))
        ]
    )
    media: list[tuple[int, int, ImageTokenLayout]] = []
    begin = 0
    for pair in pairs:
        second = begin + len(pair.chosen)
        media += [(begin + m.start, second + m.start, m.layout) for m in pair.chosen.media]
        begin += len(pair)
    pixels = [m.pixels for pair in pairs for m in pair.chosen.media]
    return Pairs(
        whole.tokens,
        whole.loss_mask,
        whole.lengths,
        torch.cat(pixels) if pixels else whole.pixels,
        media,
        torch.tensor([pair.reference for pair in pairs]),
    )


def collate(prompts: Sequence[Prompt]) -> Batch:
    """Lay prompts one after another."""
    tokens: list[int] = []
    loss_mask: list[bool] = []
    media: list[tuple[int, ImageTokenLayout]] = []
    for prompt in prompts:
        assert prompt.loss_mask is not None
        media += [(len(tokens) + m.start, m.layout) for m in prompt.media]
        tokens += prompt.tokens
        loss_mask += prompt.loss_mask
    pixels = [m.pixels for prompt in prompts for m in prompt.media]
    return Batch(
        torch.tensor(tokens),
        torch.tensor(loss_mask),
        [len(p) for p in prompts],
        torch.cat(pixels) if pixels else torch.empty(0, 3, 1, 1),
        media,
    )


def pack(
    lengths: Sequence[int], limit: int, images: Sequence[int] = (), most: int = 0
) -> list[list[int]]:
    """Indices of samples grouped so that no group is longer than `limit` tokens: best fit, longest first.

    With `most`, none has more than so many of the samples' `images` either. Raises DataError for a sample that is over a limit by
    itself.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    shown: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length, pictures = lengths[index], images[index] if most else 0
        if length > limit:
            raise DataError(
                f"sample {index} has {length:,} tokens, more than the {limit:,} of a batch: raise `tokens` or shorten it"
            )
        if pictures > most:
            raise DataError(
                f"sample {index} has {pictures:,} images, more than the {most:,} of a batch: raise `images`"
            )
        fits = [g for g in range(len(groups)) if room[g] >= length and shown[g] + pictures <= most]
        if fits:
            best = min(fits, key=lambda g: room[g])
            groups[best].append(index)
            room[best] -= length
            shown[best] += pictures
        else:
            groups.append([index])
            room.append(limit - length)
            shown.append(pictures)
    return groups


@dataclass(frozen=True, slots=True)
class Position:
    """How far the data have been read: the next batch is number `batch` of window number `window`."""

    window: int = 0
    batch: int = 0


def join(samples: Sequence[Prompt | Pair]) -> Batch | Pairs:
    """Lay samples of one kind one after another: prompts become a `Batch`, pairs `Pairs`."""
    pairs = [sample for sample in samples if isinstance(sample, Pair)]
    return (
        collate_pairs(pairs)
        if pairs
        else collate([sample for sample in samples if isinstance(sample, Prompt)])
    )


class PackedDataset(Dataset[list[Any]]):
    """Window k: the samples k * size … (k + 1) * size - 1, packed into batches in an order that `seed` and k decide.

    For samples whose lengths are not known before they are made. join: makes a batch of some.
    """

    def __init__(
        self,
        example: Callable[[int], Sized],
        count: int,
        *,
        size: int,
        tokens: int,
        seed: int,
        join: Callable[[Sequence[Any]], Any] = join,
    ) -> None:
        self.example, self.count, self.size, self.tokens, self.seed = (
            example,
            count,
            size,
            tokens,
            seed,
        )
        self.join = join

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __getitem__(self, window: int) -> list[Any]:
        first = window * self.size
        samples: list[Any] = [
            self.example(i) for i in range(first, min(first + self.size, self.count))
        ]
        groups = pack([len(sample) for sample in samples], self.tokens)
        Random(f"{self.seed}/{window}").shuffle(groups)
        return [self.join([samples[i] for i in group]) for group in groups]


class Measured(Protocol):
    """Samples, by number, and how many tokens and images (frames too) each will have, told without making it."""

    def __call__(self, index: int, /) -> Prompt | Pair: ...

    def length(self, index: int, /) -> int: ...

    def images(self, index: int, /) -> int: ...


class PlannedPackedDataset(Dataset[Any]):
    """As `Windows`, of samples whose lengths are known: a batch is decided before it is made, and is made alone."""

    def __init__(
        self, samples: Measured, count: int, *, size: int, tokens: int, seed: int, images: int = 0
    ) -> None:
        self.samples, self.count, self.size, self.tokens, self.seed, self.images = (
            samples,
            count,
            size,
            tokens,
            seed,
            images,
        )

    def __getitem__(self, numbers: list[int]) -> Batch | Pairs:
        return join([self.samples(i) for i in numbers])

    def steps(self, each: int) -> int:
        """How many steps of `each` batches all samples are; the last may have fewer."""
        return -(
            -sum(len(self._window(first)) for first in range(0, self.count, self.size)) // each
        )

    def read(self, start: Position) -> Iterator[tuple[list[int], Position]]:
        """The numbers of the samples of every batch from `start` on, with the position after it."""
        for first in range(start.window * self.size, self.count, self.size):
            window, groups = first // self.size, self._window(first)
            for index, group in enumerate(groups):
                if window > start.window or index >= start.batch:
                    last = index + 1 == len(groups)
                    yield group, Position(window + 1, 0) if last else Position(window, index + 1)

    def length(self, numbers: list[int]) -> int:
        """Tokens of a batch."""
        return sum(self.samples.length(i) for i in numbers)

    def _window(self, first: int) -> list[list[int]]:
        numbers = range(first, min(first + self.size, self.count))
        images = [self.samples.images(i) for i in numbers] if self.images else []
        groups = pack([self.samples.length(i) for i in numbers], self.tokens, images, self.images)
        Random(f"{self.seed}/{first // self.size}").shuffle(groups)
        return [[first + i for i in group] for group in groups]


def batches(
    windows: PackedDataset, start: Position, *, workers: int
) -> Iterator[tuple[Any, Position]]:
    """Batches from `start` on, each with the position after it; prepared ahead in worker processes."""
    for window, group in enumerate(
        prefetch(Subset(windows, range(start.window, len(windows))), None, workers), start.window
    ):
        for index, batch in enumerate(group):
            if window > start.window or index >= start.batch:
                last = index + 1 == len(group)
                yield batch, Position(window + 1, 0) if last else Position(window, index + 1)


def distributed_batches(
    plan: PlannedPackedDataset, start: Position, *, workers: int, each: int, ranks: ProcessGroup
) -> Iterator[tuple[Any, Position]]:
    """A rank's batches of every step of `each` from `start` on, with the position after the step; made in worker processes.

    A step's batches go to the ranks longest first, so that what they compute at the same time is as long; where too few are
    left for all, one is `Idle`.
    """

    def mine() -> Iterator[tuple[list[int], bool, Position]]:
        rest = plan.read(start)
        while step := list(islice(rest, each)):
            longest = sorted((numbers for numbers, _ in step), key=plan.length, reverse=True)
            for first in range(0, len(longest), ranks.world_size):
                at = first + ranks.rank
                idle = at >= len(longest)
                yield longest[first if idle else at], idle, step[-1][1]

    made = prefetch(plan, (numbers for numbers, *_ in mine()), workers)
    for batch, (_, idle, after) in zip(made, mine(), strict=True):
        yield DummyBatch(batch) if idle else batch, after


def _leaves_at_once(_: int) -> None:
    """A worker ends as one that was forked does. Python's end would take the interpreter from under the thread that sends what
    was made; while that copies a tensor, in C++, the process aborts over it."""
    atexit.register(os._exit, 0)


def prefetch(items: Dataset[Any], order: Iterator[list[int]] | None, workers: int) -> Iterator[Any]:
    """Items prepared ahead in worker processes.

    A terminal sends Ctrl-C, and many a batch system SIGTERM, to those as well. What it means is decided by who trains, and their
    death would be an error in the middle of a step: they are born with both blocked, since until they could say so themselves
    they import PyTorch for seconds.
    """
    loader = DataLoader(
        items,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_leaves_at_once,
    )
    if sys.platform == "win32":
        return iter(loader)
    resource_tracker.ensure_running()  # where it starts it, Python lets both signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
