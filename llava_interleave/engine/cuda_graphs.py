"""Decode steps of fixed shape, one new token per sequence, captured as CUDA graphs on a GPU.

A batch is padded to the next capture size. The inputs of a step are one tensor, written by one
copy: tokens, positions, slots, lengths and blocks. Padding rows have no tokens and write nothing. A
step that is not captured runs kernel by kernel. So do images in numbers of crops.

A step can be launched before the tokens of the previous one have been copied to the host
(asynchronous scheduling): it reads them on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .device_stream import DeviceStream, Download
from .kv_paged import PagedBatch, PagedKVCache, aligned, table_width
from .prefix_cache import SequenceKV

Outputs = tuple[Tensor, Tensor]


class DecodeRow(NamedTuple):
    """One sequence: its KV cache, the position of its newest token, and that token.

    If the step follows one that is in flight, `token` is the row of that step which samples it.
    """

    kv: SequenceKV
    position: int
    token: int


@dataclass(frozen=True, slots=True, eq=False)
class InFlightStep:
    """A launched step. rows: the row of each sequence.

    logits `[rows, vocab]` and their argmax `best [rows]` are on the device; the next launch
    overwrites them. download: `best` on its way to the host.
    """

    rows: Mapping[SequenceKV, int]
    logits: Tensor
    best: Tensor
    download: Download

    def tokens(self, sequences: Iterable[SequenceKV]) -> list[int]:
        """The argmax of each sequence. Waits for this step, not for later ones."""
        best = self.download.wait().tolist()
        return [best[self.rows[kv]] for kv in sequences]


class CudaGraphDecoder:
    """Decode steps of at most `max_num_seqs` sequences.

    step: computes logits `[N, vocab]` and their argmax from the tokens `[N]` of a batch, without
    reading a value on the host. context: positions of the longest sequence. unavailable: why steps
    are not captured, or None.
    """

    def __init__(
        self,
        step: Callable[[Tensor, PagedBatch], Outputs],
        cache: PagedKVCache,
        stream: DeviceStream,
        *,
        context: int,
        max_num_seqs: int,
    ) -> None:
        self.step, self.cache, self.stream = step, cache, stream
        self.sizes = capture_sizes(max_num_seqs)
        self.width = table_width(min(cache.num_blocks, -(-context // cache.block_size)))
        numbers, device = self._numbers(max_num_seqs), cache.pool.device
        self.inputs = torch.zeros(numbers, dtype=torch.int32, device=device)
        self.unavailable = stream.no_capture
        self._graphs: dict[int, tuple[Callable[[], object], Outputs]] = {}

    def capture(self) -> None:
        """Capture all sizes, the largest first: the others find room in its memory."""
        if self.unavailable is not None:
            return
        for size in reversed(self.sizes):
            self.stream.upload(self._inputs((), size), self.inputs[: self._numbers(size)])
            try:
                self._graphs[size] = self.stream.capture(partial(self._step, size))
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                self.drop(f"capturing a step of {size} failed: {reason}")
                return

    def drop(self, reason: str) -> None:
        """Run all steps kernel by kernel from now on."""
        self.unavailable = reason
        self._graphs.clear()

    def __call__(
        self, rows: Sequence[DecodeRow], previous: InFlightStep | None = None
    ) -> InFlightStep:
        """Launch a step. previous: the last launched one, whose rows sample the tokens of these."""
        size = next(size for size in self.sizes if size >= len(rows))
        self.stream.upload(self._inputs(rows, size), self.inputs[: self._numbers(size)])
        if previous is not None:
            self.stream.launch(partial(self._take_tokens, len(rows), previous.best))
        if size in self._graphs:
            replay, (logits, best) = self._graphs[size]
            self.stream.launch(replay)
        else:
            logits, best = self._step(size)
        best = best[: len(rows)]
        row_of = {row.kv: number for number, row in enumerate(rows)}
        # Copied now, since the next step overwrites it.
        return InFlightStep(row_of, logits[: len(rows)], best, self.stream.download(best))

    def _numbers(self, size: int) -> int:
        """Of the inputs: four columns, each a multiple of 16 bytes long, and the table."""
        return 4 * aligned(size) + size * self.width

    def _inputs(self, rows: Sequence[DecodeRow], size: int) -> Tensor:
        inputs, block = self.stream.host(self._numbers(size)), self.cache.block_size
        numbers, length = inputs.numpy(), aligned(size)
        columns, table = numbers[: 4 * length].reshape(4, length), numbers[4 * length :]
        columns[:] = [[0], [0], [-1], [0]]
        lines = table.reshape(size, self.width)
        lines[:] = self.cache.num_blocks
        for number, (kv, position, token) in enumerate(rows):
            slot = kv.blocks[position // block] * block + position % block
            columns[:, number] = token, position, slot, position + 1
            lines[number, : len(kv.blocks)] = kv.blocks
        return inputs

    def _take_tokens(self, count: int, best: Tensor) -> None:
        """Replace the rows of the previous step by the tokens that they sampled."""
        tokens = self.inputs[:count]
        tokens.copy_(best.index_select(0, tokens).clamp_min(0))

    def _step(self, size: int) -> Outputs:
        length = aligned(size)
        columns = self.inputs[: 4 * length].view(4, length)[:, :size]
        table = self.inputs[4 * length : self._numbers(size)].view(size, self.width)
        tokens, positions, slots, lengths = columns
        return self.step(tokens, PagedBatch(size, positions, slots, table, lengths))


class CudaGraphTower:
    """The vision encoder for 8, 4, 2 and 1 crops; other numbers are sums of these.

    encode: crops `[N, 3, S, S]` -> features `[N, tokens, D]`. unavailable: as `CudaGraphDecoder`.
    """

    def __init__(
        self, encode: Callable[[Tensor], Tensor], pixels: Tensor, stream: DeviceStream
    ) -> None:
        self.encode, self.pixels, self.stream = encode, pixels, stream
        self.sizes = [size for size in (8, 4, 2, 1) if size <= len(pixels)]
        self.unavailable = stream.no_capture
        self._graphs: dict[int, tuple[Callable[[], object], Tensor]] = {}

    def capture(self) -> None:
        """Capture all sizes, the largest first."""
        for size in self.sizes if self.unavailable is None else ():
            try:
                self._graphs[size] = self.stream.capture(partial(self._step, size))
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                self.unavailable = f"capturing {size} crops failed: {reason}"
                self._graphs.clear()
                return

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features of crops, in memory of their own."""
        if not self._graphs:
            return self.encode(pixels)
        parts = []
        while len(pixels):
            size = next(size for size in self.sizes if size <= len(pixels))
            replay, features = self._graphs[size]
            self.pixels[:size].copy_(pixels[:size])
            self.stream.launch(replay)
            parts.append(features.clone())
            pixels = pixels[size:]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _step(self, size: int) -> Tensor:
        return self.encode(self.pixels[:size])


def capture_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes that steps are padded to, up to `max_num_seqs`."""
    sizes = (1, 2, 4, 8, *range(16, max_num_seqs + 16, 16))
    return sorted({min(size, max_num_seqs) for size in sizes})
