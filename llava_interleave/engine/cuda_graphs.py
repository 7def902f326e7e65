"""Decode steps of fixed shape, one new token per sequence, captured as CUDA graphs on a GPU.

A batch is padded to the next capture size. The inputs of a step are one tensor, written by one
copy: a row per sequence with its token, its position and its blocks. Padding rows write to the
padding block. A step that is not captured runs kernel by kernel.

A step can be launched before the tokens of the previous one have been copied to the host
(asynchronous scheduling): it reads them on the device.
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
    overwrites them. host_best: `best` on the host, once the event `copied` has happened.
    """

    rows: Mapping[SequenceKV, int]
    logits: Tensor
    best: Tensor
    host_best: Tensor
    copied: torch.cuda.Event | None

    def tokens(self, sequences: Iterable[SequenceKV]) -> list[int]:
        """The argmax of each sequence. Waits for this step, not for later ones."""
        if self.copied is not None:
            self.copied.synchronize()
        best = self.host_best.tolist()
        return [best[self.rows[kv]] for kv in sequences]


class CudaGraphDecoder:
    """Decode steps of at most `max_num_seqs` sequences; token ids are below `vocab`.

    unavailable: why steps are not captured, or None.
    """

    def __init__(self, model: Llava, cache: PagedKVCache, *, vocab: int, max_num_seqs: int) -> None:
        self.model, self.cache, self.vocab = model, cache, vocab
        self.sizes = capture_sizes(max_num_seqs)
        max_blocks = -(-model.config.text.context // cache.block_size)
        width = max(1, min(cache.num_blocks, max_blocks))
        shape, device = (max_num_seqs, 2 + width), cache.pool.device
        self.inputs = torch.zeros(shape, dtype=torch.int32, device=device)
        self.unavailable = unavailable_reason(cache)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]] = {}

    def __call__(
        self, rows: Sequence[DecodeRow], previous: InFlightStep | None = None
    ) -> InFlightStep:
        """Launch a step. previous: the last launched one, whose rows sample the tokens of these."""
        size = next(size for size in self.sizes if size >= len(rows))
        self._write_inputs(rows, size)
        if previous is not None:
            tokens = self.inputs[: len(rows), 0]
            tokens.copy_(previous.best.index_select(0, tokens))
        if self.unavailable is None and size not in self._graphs:
            try:
                self._graphs[size] = self._capture(size)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                self.unavailable = f"capturing a step of {size} failed: {reason}"
        if size in self._graphs:
            graph, (logits, best) = self._graphs[size]
            graph.replay()
        else:
            logits, best = self._step(size)
        best = best[: len(rows)]
        # Copied now, since the next step overwrites it; from a GPU to pinned memory, without
        # waiting.
        host_best = best.to("cpu", non_blocking=True, copy=True)
        copied = torch.cuda.current_stream(best.device).record_event() if best.is_cuda else None
        row_of = {row.kv: number for number, row in enumerate(rows)}
        return InFlightStep(row_of, logits[: len(rows)], best, host_best, copied)

    def _write_inputs(self, rows: Sequence[DecodeRow], size: int) -> None:
        # New memory for each step: the copy of the previous one may not have finished.
        shape, pinned = (size, self.inputs.shape[1]), self.inputs.is_cuda
        inputs = torch.zeros(shape, dtype=torch.int32, pin_memory=pinned)
        table = inputs.numpy()
        table[:, 2:] = self.cache.num_blocks
        for line, row in zip(table, rows, strict=False):
            line[:2] = row.token, row.position
            line[2 : 2 + len(row.kv.blocks)] = row.kv.blocks
        self.inputs[:size].copy_(inputs, non_blocking=True)

    def _step(self, size: int) -> tuple[Tensor, Tensor]:
        tokens, positions = self.inputs[:size, :2].t().contiguous()
        attend = self.cache.attend_decode(positions, self.inputs[:size, 2:].contiguous())
        hidden = self.model.forward(self.model.embed(tokens), positions, attend)
        placeholders = self.model.config.placeholder_ids
        logits = mask_invalid_tokens(self.model.logits(hidden), self.vocab, placeholders)
        return logits, logits.argmax(-1)

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
        device = self.inputs.device
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        # the second context restores the stream also after a capture that fails
        with torch.cuda.device(device), torch.cuda.stream(current):
            side.wait_stream(current)
            with torch.cuda.stream(side):  # warm-up: libraries initialize on the first call
                self._step(size)
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            other = next(iter(self._graphs.values()), None)
            pool = None if other is None else other[0].pool()
            # thread_local: other threads may use the GPU meanwhile
            with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
                outputs = self._step(size)
        return graph, outputs


def capture_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes that steps are padded to, up to `max_num_seqs`."""
    sizes = (1, 2, 4, 8, *range(16, max_num_seqs + 16, 16))
    return sorted({min(size, max_num_seqs) for size in sizes})


def unavailable_reason(cache: PagedKVCache) -> str | None:
    """Why decode steps with this cache cannot be captured, or None."""
    if not cache.pool.is_cuda:
        return "no CUDA device"
    if cache.kernel == "sdpa":
        return "without a kernel for paged attention the shapes vary"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "tensor parallelism"
    return None
