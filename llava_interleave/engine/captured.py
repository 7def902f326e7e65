"""Decode steps of a fixed shape, one new token a sequence: on a GPU a CUDA graph each, so that a step costs one launch.

A step is filled up to the next of a few sizes. What differs between steps lies in one tensor, written by one copy: a row a
sequence, its token, its position and its blocks. Rows that fill up write to the block that nobody reads. A step that is not
captured is computed all the same, launch by launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model import Llava
from .paged import Paged
from .sampling import writable

Row = tuple[int, int, Sequence[int]]
"""Of a sequence: its newest token, the position of that, its blocks."""


class Captured:
    """Decode steps of at most `most` sequences of `model` in `memory`, whose tokens are below `vocab`.

    why_not: why steps are not captured; None while they are.
    """

    def __init__(self, model: Llava, memory: Paged, *, vocab: int, most: int) -> None:
        self.model, self.memory, self.vocab = model, memory, vocab
        self.sizes = sizes(most)
        width = max(1, min(memory.count, -(-model.config.text.context // memory.block)))
        self.given = torch.zeros(most, 2 + width, dtype=torch.int32, pin_memory=memory.pool.is_cuda)
        self.inputs = self.given.to(memory.pool.device, copy=True)
        self.why_not = why_not(memory)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]] = {}

    def __call__(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Logits `[rows, vocab]` of the tokens that come next, and the likeliest of them; they hold until the next call."""
        size = next(size for size in self.sizes if size >= len(rows))
        self._fill(rows, size)
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
        return logits[: len(rows)], best[: len(rows)]

    def _fill(self, rows: Sequence[Row], size: int) -> None:
        given = self.given[:size].numpy()
        given[:, :2], given[:, 2:] = 0, self.memory.count
        for row, (token, position, blocks) in zip(given, rows, strict=False):
            row[:2] = token, position
            row[2 : 2 + len(blocks)] = blocks
        self.inputs[:size].copy_(self.given[:size], non_blocking=True)

    def _step(self, size: int) -> tuple[Tensor, Tensor]:
        tokens, positions = self.inputs[:size, :2].t().contiguous()
        attend = self.memory.attend_next(positions, self.inputs[:size, 2:].contiguous())
        hidden = self.model.forward(self.model.embed(tokens), positions, attend)
        logits = writable(self.model.logits(hidden), self.vocab, self.model.config.image_token_id)
        return logits, logits.argmax(-1)

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
        device = self.inputs.device
        here, beside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(here):  # to which it comes back also from a capture that fails
            beside.wait_stream(here)
            with torch.cuda.stream(beside):  # once before, for what libraries set up when first called
                self._step(size)
            here.wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            others = next(iter(self._graphs.values()), None)
            pool = None if others is None else others[0].pool()
            with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):  # other threads may use the GPU
                found = self._step(size)
        return graph, found


def sizes(most: int) -> list[int]:
    """How many sequences steps are filled up to, the largest `most`."""
    return sorted({min(size, most) for size in (1, 2, 4, 8, *range(16, most + 16, 16))})


def why_not(memory: Paged) -> str | None:
    """Why a decode step in this memory cannot be captured; None where it can."""
    if not memory.pool.is_cuda:
        return "there is no CUDA here"
    if memory.kernel == "sdpa":
        return "without a kernel that reads blocks its shape is another each time"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "several processes share the network"
    return None
