"""Samples become flat batches, packed by best fit; no sample is cut or dropped."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from multiprocessing import resource_tracker
from random import Random
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...distributed.process_group import ProcessGroup
from ...errors import DataError, LlavaError
from ...image_layout import ImageTokenLayout
from ...prompt import Prompt

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)
"""Signals that end a run in order: of batch systems, of Ctrl-C, of a terminal that closes."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Several samples, one after another.

    tokens: `[T]` ids with expanded placeholders. loss_mask: `[T]`, True where a token carries loss.
    lengths: tokens of each sample. pixels: `[N, 3, S, S]`, crops of all media. media: (index of the
    first placeholder, layout) of each, in the order of the crops. weights: `[T]`, of the loss of
    each token; None where all are 1.
    """

    tokens: Tensor
    loss_mask: Tensor
    lengths: list[int]
    pixels: Tensor
    media: list[tuple[int, ImageTokenLayout]]
    weights: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """`[T]`, from 0 in each sample."""
        return positions(self.lengths)


def positions(lengths: Sequence[int]) -> Tensor:
    """Positions of the tokens of packed samples, from 0 in each."""
    return torch.cat([torch.arange(n) for n in lengths])


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference pair: one conversation with two last answers, which alone carry loss.

    reference: log-probabilities of both answers under the reference model. desirable: of KTO, where
    `rejected` is another sample's answer, whether `chosen` is.
    """

    chosen: Prompt
    rejected: Prompt
    reference: tuple[float, float]
    desirable: bool = True

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Several pairs, packed: chosen, rejected, chosen, rejected ... Images are there once a pair.

    As `Batch`; media: (first placeholder in chosen, first placeholder in rejected, layout).
    reference: `[P, 2]`, log-probabilities under the reference model. desirable: `[P]`, of KTO.
    """

    tokens: Tensor
    loss_mask: Tensor
    lengths: list[int]
    pixels: Tensor
    media: list[tuple[int, int, ImageTokenLayout]]
    reference: Tensor
    desirable: Tensor

    def side(self, number: int) -> Batch:
        """The chosen (0) or the other (1) answers, with their images."""
        ends = list(accumulate(self.lengths))
        media = []
        for *starts, layout in self.media:
            sample = bisect_right(ends, starts[number])
            media.append((starts[number] - sum(self.lengths[1 - number : sample : 2]), layout))
        tokens, loss_mask = (
            torch.cat(whole.split(self.lengths)[number::2])
            for whole in (self.tokens, self.loss_mask)
        )
        return Batch(tokens, loss_mask, self.lengths[number::2], self.pixels, media)


@dataclass(frozen=True, slots=True)
class DummyBatch:
    """A batch that a rank computes for the collectives alone; its loss counts nothing."""

    batch: Batch | Pairs


def collate_pairs(pairs: Sequence[Pair]) -> Pairs:
    """Pack pairs."""
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
        torch.tensor([pair.desirable for pair in pairs]),
    )


def collate(prompts: Sequence[Prompt]) -> Batch:
    """Pack prompts."""
    tokens: list[int] = []
    loss_mask: list[float] = []
    media: list[tuple[int, ImageTokenLayout]] = []
    for prompt in prompts:
        assert prompt.loss_mask is not None
        media += [(len(tokens) + m.start, m.layout) for m in prompt.media]
        tokens += prompt.tokens
        loss_mask += prompt.loss_mask
    pixels = [m.pixels for prompt in prompts for m in prompt.media]
    return Batch(
        torch.tensor(tokens),
        torch.tensor([value > 0 for value in loss_mask]),
        [len(p) for p in prompts],
        torch.cat(pixels) if pixels else torch.empty(0, 3, 1, 1),
        media,
        torch.tensor(loss_mask, dtype=torch.float32) if {*loss_mask} - {0, 1} else None,
    )


def pack(
    lengths: Sequence[int], limit: int, images: Sequence[int] = (), most: int = 0
) -> list[list[int]]:
    """Groups of indices of samples with at most `limit` tokens each, by best fit decreasing.

    With `most`, no group has more than so many of the samples' `images`. Raises DataError for a
    sample that is over a limit by itself.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    shown: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length, count = lengths[index], images[index] if most else 0
        if length > limit:
            raise DataError(
                f"sample {index} has {length:,} tokens, more than the {limit:,} of a batch: "
                "raise `tokens` or shorten it"
            )
        if count > most:
            raise DataError(
                f"sample {index} has {count:,} images, more than the {most:,} of a batch: "
                "raise `images`"
            )
        fits = [g for g in range(len(groups)) if room[g] >= length and shown[g] + count <= most]
        if fits:
            best = min(fits, key=lambda g: room[g])
            groups[best].append(index)
            room[best] -= length
            shown[best] += count
        else:
            groups.append([index])
            room.append(limit - length)
            shown.append(count)
    return groups


@dataclass(frozen=True, slots=True)
class Position:
    """Progress through the data: the next batch is number `batch` of window number `window`."""

    window: int = 0
    batch: int = 0


def join(samples: Sequence[Prompt | Pair]) -> Batch | Pairs:
    """Pack samples of one kind: prompts become a `Batch`, pairs `Pairs`."""
    pairs = [sample for sample in samples if isinstance(sample, Pair)]
    return (
        collate_pairs(pairs)
        if pairs
        else collate([sample for sample in samples if isinstance(sample, Prompt)])
    )


class SampleSource(Protocol):
    """Samples by number, with numbers of tokens and images (with video frames) known in advance."""

    def __call__(self, index: int, /) -> Prompt | Pair: ...

    def length(self, index: int, /) -> int: ...

    def images(self, index: int, /) -> int: ...


class PlannedPackedDataset(Dataset[Any]):
    """Samples number k * size ... (k + 1) * size - 1 are window k: packed into batches, shuffled.

    Lengths are known in advance, so batches are planned without making samples. An item is a batch;
    its index is the list of its samples' numbers.
    """

    def __init__(
        self,
        samples: SampleSource,
        count: int,
        *,
        size: int,
        tokens: int,
        seed: int,
        images: int = 0,
    ) -> None:
        self.samples, self.count, self.size, self.tokens, self.seed, self.images = (
            samples,
            count,
            size,
            tokens,
            seed,
            images,
        )

    def __getitem__(self, numbers: list[int]) -> Batch | Pairs | LlavaError:
        """A batch; an error is returned, since a raised one reaches the training process as text
        with a traceback."""
        try:
            return join([self.samples(i) for i in numbers])
        except LlavaError as error:
            return error

    def steps(self, each: int) -> int:
        """How many steps of `each` batches there are; the last may have fewer batches."""
        return -(
            -sum(len(self._window(first)) for first in range(0, self.count, self.size)) // each
        )

    def read(self, start: Position) -> Iterator[tuple[list[int], Position]]:
        """The samples' numbers of every batch from `start` on, with the position after it."""
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


def distributed_batches(
    plan: PlannedPackedDataset, start: Position, *, workers: int, each: int, ranks: ProcessGroup
) -> Iterator[tuple[Any, Position]]:
    """A rank's batches of every step of `each` from `start` on, with the position after the step.

    A step's batches are dealt to the ranks longest first, so that ranks compute batches of similar
    length at the same time. A rank without a batch gets a `DummyBatch`.
    """

    def mine() -> Iterator[tuple[list[int], bool, Position]]:
        rest = plan.read(start)
        while step := list(islice(rest, each)):
            longest = sorted((numbers for numbers, _ in step), key=plan.length, reverse=True)
            for first in range(0, len(longest), ranks.world_size):
                at = first + ranks.rank
                idle = at >= len(longest)
                yield longest[first if idle else at], idle, step[-1][1]

    items = prefetch(plan, (numbers for numbers, *_ in mine()), workers)
    try:
        for batch, (_, idle, after) in zip(items, mine(), strict=True):
            if isinstance(batch, LlavaError):
                raise batch
            yield DummyBatch(batch) if idle else batch, after
    finally:
        stop_workers(items)


def _exit_at_once(_: int) -> None:
    """A worker ends like a forked one. Python's own exit would finalize the interpreter under the
    thread that sends batches; if that is copying a tensor in C++, the process aborts."""
    atexit.register(os._exit, 0)


def prefetch(items: Dataset[Any], order: Iterator[list[int]] | None, workers: int) -> Iterator[Any]:
    """Items, prefetched by worker processes.

    Terminals send Ctrl-C and SIGHUP, and batch systems SIGTERM, to workers too. The training
    process decides what a signal means, and a worker's death would be an error in the middle of a
    step: workers are started with them blocked, since they import PyTorch for seconds before they
    could block them.
    """
    loader = DataLoader(
        items,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_exit_at_once,
    )
    if sys.platform == "win32":
        iterator = iter(loader)
    else:
        resource_tracker.ensure_running()  # Python unblocks both signals where it starts it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            iterator = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if workers:
        _running.add(iterator)
    return iterator


_running: WeakSet[Any] = WeakSet()
"""Iterators with worker processes."""


def stop_workers(iterator: Any) -> None:
    """End the worker processes of a `prefetch`; one that does not end by itself is killed."""
    if iterator not in _running:
        return
    _running.discard(iterator)
    iterator._shutdown_workers()
    for worker in iterator._workers:
        if worker.is_alive():
            worker.kill()  # it blocks SIGTERM


@atexit.register
def _stop_all_workers() -> None:
    """After an error somebody may still hold an iterator. Python's own exit would send its workers
    SIGTERM, which they block, and wait for them for ever."""
    for iterator in list(_running):
        stop_workers(iterator)
