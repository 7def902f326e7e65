"""Decode steps of a fixed shape, one new token a sequence: on a GPU a CUDA graph each, so that a step costs one launch.

A step is filled up to the next of a few sizes. What differs between steps lies in one tensor, written by one copy: a row a
sequence, its token, its position and its blocks. Rows that fill up write to the block that nobody reads. A step that is not
captured is computed all the same, launch by launch.

A step can be launched before the tokens of the one before have come to the host: it takes them where they are, on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import Llava
from .kv_paged import PagedKVCache
from .prefix_cache import SequenceKV
from .sampler import mask_invalid_tokens


class DecodeRow(NamedTuple):
    """Of a sequence: its memory, the position of its newest token, and that token; where a step follows another whose tokens are
    not known yet, the row of that which chooses it."""

    kv: SequenceKV
    position: int
    token: int


@dataclass(frozen=True, slots=True, eq=False)
class InFlightStep:
    """A step that was launched. rows: the row of each sequence.

    logits `[rows, vocab]` of the tokens that come next, best `[rows]`, the likeliest of them: on the device, until the next step
    is launched. copy: of best, on the host once `copied`.
    """

    rows: Mapping[SequenceKV, int]
    logits: Tensor
    best: Tensor
    copy: Tensor
    copied: torch.cuda.Event | None

    def tokens(self, kvs: Iterable[SequenceKV]) -> list[int]:
        """The likeliest token of each of these sequences. Waits for this step, but for none that was launched after it."""
        if self.copied is not None:
            self.copied.synchronize()
        found = self.copy.tolist()
        return [found[self.rows[kv]] for kv in kvs]


class CudaGraphDecoder:
    """Decode steps of at most `most` sequences of `model` in `memory`, whose tokens are below `vocab`.

    why_not: why steps are not captured; None while they are.
    """

    def __init__(self, model: Llava, memory: PagedKVCache, *, vocab: int, most: int) -> None:
        self.model, self.memory, self.vocab = model, memory, vocab
        self.sizes = sizes(most)
        width = max(1, min(memory.count, -(-model.config.text.context // memory.block)))
        self.inputs = torch.zeros(most, 2 + width, dtype=torch.int32, device=memory.pool.device)
        self.why_not = unavailable_reason(memory)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]] = {}

    def __call__(
        self, rows: Sequence[DecodeRow], before: InFlightStep | None = None
    ) -> InFlightStep:
        """Launch a step. before: the one launched last, whose rows choose the tokens of these."""
        size = next(size for size in self.sizes if size >= len(rows))
        self._fill(rows, size)
        if before is not None:
            tokens = self.inputs[: len(rows), 0]
            tokens.copy_(before.best.index_select(0, tokens))
        if self.why_not is None and size not in self._graphs:
            try:
                self._graphs[size] = self._capture(size)
            except RuntimeError as error:
                self.why_not = f"capturing a step of {size} failed: {str(error).splitlines()[0]}"
        if size in self._graphs:
            graph, (logits, best) = self._graphs[size]
            graph.replay()
        else:
            logits, best = self._step(size)
        best = best[: len(rows)]
        # now, for the next step writes there too; from a GPU it goes to pinned memory, and nobody waits for it here
        copy = best.to("cpu", non_blocking=True, copy=True)
        copied = torch.cuda.current_stream(best.device).record_event() if best.is_cuda else None
        numbers = {row.kv: number for number, row in enumerate(rows)}
        return InFlightStep(numbers, logits[: len(rows)], best, copy, copied)

    def _fill(self, rows: Sequence[DecodeRow], size: int) -> None:
        # in other memory each time: what the step before was given may still be on its way
        given = torch.zeros(
            size, self.inputs.shape[1], dtype=torch.int32, pin_memory=self.inputs.is_cuda
        )
        table = given.numpy()
        table[:, 2:] = self.memory.count
        for line, row in zip(table, rows, strict=False):
            line[:2] = row.token, row.position
            line[2 : 2 + len(row.kv.blocks)] = row.kv.blocks
        self.inputs[:size].copy_(given, non_blocking=True)

    def _step(self, size: int) -> tuple[Tensor, Tensor]:
        tokens, positions = self.inputs[:size, :2].t().contiguous()
        attend = self.memory.attend_next(positions, self.inputs[:size, 2:].contiguous())
        hidden = self.model.forward(self.model.embed(tokens), positions, attend)
        logits = mask_invalid_tokens(
            self.model.logits(hidden), self.vocab, self.model.config.image_token_id
        )
        return logits, logits.argmax(-1)

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
        device = self.inputs.device
        here, beside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        with (
            torch.cuda.device(device),
            torch.cuda.stream(here),
        ):  # to which it comes back also from a capture that fails
            beside.wait_stream(here)
            with torch.cuda.stream(
                beside
            ):  # once before, for what libraries set up when first called
                self._step(size)
            here.wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            others = next(iter(self._graphs.values()), None)
            pool = None if others is None else others[0].pool()
            with torch.cuda.graph(
                graph, pool, capture_error_mode="thread_local"
            ):  # other threads may use the GPU
                found = self._step(size)
        return graph, found


def sizes(most: int) -> list[int]:
    """How many sequences steps are filled up to, the largest `most`."""
    return sorted({min(size, most) for size in (1, 2, 4, 8, *range(16, most + 16, 16))})


def unavailable_reason(memory: PagedKVCache) -> str | None:
    """Why a decode step in this memory cannot be captured; None where it can."""
    if not memory.pool.is_cuda:
        return "there is no CUDA here"
    if memory.kernel == "sdpa":
        return "without a kernel that reads blocks its shape is another each time"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "several processes share the network"
    return None
