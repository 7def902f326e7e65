"""Paged KV cache: blocks of one pool, as the attention kernels of GPUs read them.

Same interface as `kv_contiguous`. `BlockAllocator` assigns the blocks. Sequences with a common
prefix share its whole blocks, so that only a partly filled block is copied. The Triton kernels read
a pool of 16 bits or of int8. Without them PyTorch's SDPA computes one sequence after another, from
a copy of its KV cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..config import TextConfig
from ..errors import OptionError
from ..kernels import triton as kt
from ..model import AttentionFn
from .device_stream import DeviceStream
from .kv_contiguous import ContiguousKV, Span, bytes_per_token, import_tensors, quantize_kv
from .prefix_cache import SequenceKV

KV_BLOCK_SIZE = 256
"""Tokens per block. Sequences share whole blocks; a block table has a number for each."""
TABLE_MULTIPLE, ALIGNMENT = 16, 4
"""Columns of a block table, and numbers before the next part of an upload: Triton compiles a kernel
again for a stride of 1 or no multiple of 16, and for an address of no multiple of 16 bytes."""


@dataclass(frozen=True)
class PagedBatch:
    """Where the T tokens of N sequences of a step lie, int32 on the device.

    The first `decodes` sequences have one token each. positions: `[T]`. slots: `[T]`, block *
    block_size + place in it; negative: not written. block_table: `[N, max_blocks]`. seqlens_k: all
    tokens of each of these first sequences. prefill_seqlens_k, cu_seqlens_q: all tokens of each of
    the others, and cumulative numbers of their new ones `[N - decodes + 1]`; max_seqlen_q: the
    most. spans: start and stop of each sequence, on the host, for SDPA.
    """

    decodes: int
    positions: Tensor
    slots: Tensor
    block_table: Tensor
    seqlens_k: Tensor
    prefill_seqlens_k: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    max_seqlen_q: int = 1
    spans: Sequence[Span] = ()

    def attend(self, q: Tensor, kv: kt.LayerKV) -> Tensor:
        """Attention of queries `[T, H, d]` over a layer that has all keys and values."""
        n, table, parts = self.decodes, self.block_table, []
        if n:
            parts.append(kt.paged_decode(q[:n], kv, table[:n], self.seqlens_k))
        if self.cu_seqlens_q is not None and self.prefill_seqlens_k is not None:
            lengths, starts = self.prefill_seqlens_k, self.cu_seqlens_q
            most = self.max_seqlen_q
            parts.append(kt.paged_attention(q[n:], kv, table[n:], starts, lengths, most))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def table_width(blocks: int) -> int:
    """Columns of a block table for sequences of so many blocks."""
    return max(1, -(-blocks // TABLE_MULTIPLE)) * TABLE_MULTIPLE


def aligned(numbers: int) -> int:
    """Numbers of 4 bytes up to the next that Triton finds aligned."""
    return -(-numbers // ALIGNMENT) * ALIGNMENT


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels do not compute on a device; None where they do."""
    if device.type != "cuda":
        return "no CUDA device"
    return kt.unavailable_reason(device, dtype)


class PagedKVCache:
    """The KV memory of all sequences of a model on one device: `kv_bytes` of blocks, one padding
    block.

    dtype: of the computation. layers: keys and values of each, views of the pool. no_kernels: why
    the Triton kernels do not compute, or None. Raises `OptionError` if the device has not enough
    memory.
    """

    def __init__(
        self,
        c: TextConfig,
        dtype: torch.dtype,
        device: torch.device,
        kv_bytes: int,
        *,
        block_size: int = KV_BLOCK_SIZE,
        int8: bool = False,
    ) -> None:
        self.bytes_per_token = bytes_per_token(c, dtype, int8=int8)
        self.dtype = torch.int8 if int8 else dtype  # of the storage
        self.block_size = block_size
        self.num_blocks = kv_bytes // (block_size * self.bytes_per_token)
        self.no_kernels = unavailable_reason(device, dtype)
        shape = (c.num_layers, 2, self.num_blocks + 1, block_size, c.num_kv_heads)
        try:  # zero-initialized: masked values are multiplied by 0, and 0 * NaN is NaN
            self.pool = torch.zeros((*shape, c.head_dim), dtype=self.dtype, device=device)
            self.scales = torch.zeros(shape, dtype=torch.float16, device=device) if int8 else None
        except torch.OutOfMemoryError as error:
            raise OptionError(
                f"{kv_bytes:,} bytes of KV cache do not fit on {device}: {error}"
            ) from None
        scales = [()] * c.num_layers if self.scales is None else self.scales
        layers = zip(self.pool, scales, strict=True)
        self.layers = [kt.LayerKV(*pool, *own) for pool, own in layers]
        self._compute_dtype = dtype
        self._empty = torch.empty((c.num_kv_heads, c.head_dim, 0), dtype=self.dtype, device=device)

    @property
    def attention(self) -> str:
        """A description of the attention backend."""
        kernel = "Triton" if self.no_kernels is None else f"sdpa ({self.no_kernels})"
        return f"{kernel} over a paged KV cache, {self.block_size} tokens per block"

    def prepare(self, kv: SequenceKV) -> None:
        """Nothing: the allocator has assigned the blocks."""

    def copy(self, source: SequenceKV, target: SequenceKV, length: int) -> None:
        """Copy the first `length` tokens to another sequence, except for blocks that both share."""
        pairs = zip(source.blocks[: -(-length // self.block_size)], target.blocks, strict=False)
        for old, new in (pair for pair in pairs if pair[0] != pair[1]):
            for pool in (self.pool,) if self.scales is None else (self.pool, self.scales):
                pool[:, :, new] = pool[:, :, old]

    def export_tensors(self, kv: SequenceKV, length: int) -> dict[str, Tensor]:
        """A copy of the first `length` tokens, as `ContiguousKV.export_tensors`."""
        slots = self._slots(kv, length)
        out = ContiguousKV(len(self.pool), self._empty)
        out.resize(length, 0)
        for layer in range(len(self.pool)):
            keys, values = (part.flatten(0, 1)[slots] for part in self.pool[layer])
            out.keys[layer] = keys.permute(1, 2, 0).contiguous()
            out.values[layer] = values.transpose(0, 1).contiguous()
            if self.scales is not None:
                out.key_scales[layer], out.value_scales[layer] = (
                    part.flatten(0, 1)[slots].t().contiguous() for part in self.scales[layer]
                )
        return out.export_tensors(length)

    lend_tensors = export_tensors  # a copy: nobody changes it

    def import_tensors(self, tensors: Mapping[str, Tensor], length: int) -> ContiguousKV:
        """As `ContiguousKVCache.import_tensors`."""
        return import_tensors(tensors, length, len(self.pool), self._empty)

    def adopt(self, kv: SequenceKV, contiguous: ContiguousKV) -> None:
        """Write imported memory of all its tokens to the blocks of a sequence."""
        slots = self._slots(kv, contiguous.capacity)
        for layer in range(len(self.pool)):
            keys, values = contiguous.keys[layer], contiguous.values[layer]
            self._write(self.pool[layer], slots, keys.permute(2, 0, 1), values.transpose(0, 1))
            if self.scales is not None:
                scales = contiguous.key_scales[layer], contiguous.value_scales[layer]
                self._write(self.scales[layer], slots, *(scale.t() for scale in scales))

    def batch(
        self, spans: Sequence[Span], stream: DeviceStream, *extra: Sequence[int]
    ) -> tuple[PagedBatch, list[Tensor]]:
        """The tokens of a step, a sequence after another, and `extra` numbers on the device.

        All numbers go there in one copy. Spans of one token must come first.
        """
        counts = [span.stop - span.start for span in spans]
        decodes = next((i for i, count in enumerate(counts) if count != 1), len(counts))
        assert 1 not in counts[decodes:]
        stops = [span.stop for span in spans]
        lists: list[Sequence[int]] = [
            [at for span in spans for at in range(span.start, span.stop)],
            self._host_slots((span.kv, span.start, span.stop) for span in spans).tolist(),
            stops[:decodes],
            stops[decodes:],
            [0, *accumulate(counts[decodes:])],
            *extra,
        ]
        width = table_width(max(-(-stop // self.block_size) for stop in stops))
        sizes = [*map(len, lists), len(spans) * width]
        starts = list(accumulate(map(aligned, sizes), initial=0))
        host = self._host(stream, starts, lists)
        table = host.numpy()[starts[-2] :].reshape(len(spans), width)
        table[:] = self.num_blocks
        for line, span in zip(table, spans, strict=True):
            used = span.kv.blocks[:width]
            line[: len(used)] = used
        there = stream.upload(host)
        parts = [there[start : start + n] for start, n in zip(starts, sizes, strict=False)]
        positions, slots, lengths, others, cu_seqlens_q, *rest = parts
        table_there = rest.pop().view(len(spans), width)
        batch = PagedBatch(decodes, positions, slots, table_there, lengths, spans=spans)
        if decodes < len(spans):
            batch = replace(
                batch,
                prefill_seqlens_k=others,
                cu_seqlens_q=cu_seqlens_q,
                max_seqlen_q=max(counts),
            )
        return batch, rest

    @staticmethod
    def _host(stream: DeviceStream, starts: list[int], lists: list[Sequence[int]]) -> Tensor:
        """Memory of the host with numbers from these starts on, and room for more at the end."""
        host = stream.host(starts[-1])
        numbers = host.numpy()
        for values, start in zip(lists, starts, strict=False):
            numbers[start : start + len(values)] = values
        return host

    def attend(self, batch: PagedBatch) -> AttentionFn:
        """The attention of a step."""
        return _PagedAttention(self, batch)

    def _host_slots(
        self, spans: Iterable[tuple[SequenceKV, int, int]]
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Indices of tokens in the pool: of each sequence those from a first to a last."""
        size, parts = self.block_size, []
        for kv, start, stop in spans:
            at = np.arange(start, stop)
            parts.append(np.asarray(kv.blocks)[at // size] * size + at % size)
        return np.concatenate(parts)

    def _slots(self, kv: SequenceKV, length: int) -> Tensor:
        """Of the first tokens of a sequence, on the device."""
        return torch.from_numpy(self._host_slots([(kv, 0, length)])).to(self.pool.device)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write the keys and values `[T, Hkv, d]` of tokens."""
        if self.scales is not None:
            k, key_scales = quantize_kv(k)
            v, value_scales = quantize_kv(v)
            self._write(self.scales[layer], slots, key_scales, value_scales)
        self._write(self.pool[layer], slots, k, v)

    def read(self, layer: int, slots: Tensor) -> list[Tensor]:
        """A copy of the keys and values `[T, Hkv, d]` of tokens, in the dtype of the
        computation."""
        parts = [part.flatten(0, 1)[slots] for part in self.pool[layer]]
        if self.scales is None:
            return parts
        scales = (part.flatten(0, 1)[slots][..., None].float() for part in self.scales[layer])
        return [
            (part * scale).to(self._compute_dtype)
            for part, scale in zip(parts, scales, strict=True)
        ]

    @staticmethod
    def _write(pools: Tensor, slots: Tensor, *rows: Tensor) -> None:
        for pool, new in zip(pools, rows, strict=True):
            pool.flatten(0, 1).index_copy_(0, slots, new)


class _PagedAttention:
    def __init__(self, cache: PagedKVCache, batch: PagedBatch) -> None:
        self.cache, self.batch, self.slots = cache, batch, batch.slots.long()
        self.counts = [span.stop - span.start for span in batch.spans]
        self.kv_slots: list[Tensor] = []  # of all tokens of each sequence, for SDPA
        if cache.no_kernels is not None:
            self.kv_slots = [cache._slots(span.kv, span.stop) for span in batch.spans]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.write(layer, self.slots, k, v)
        if not self.kv_slots:
            return self.batch.attend(q, self.cache.layers[layer])
        parts = zip(q.split(self.counts), self.kv_slots, strict=True)
        return torch.cat([sdpa(part, *self.cache.read(layer, slots)) for part, slots in parts])


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one sequence: queries `[T, H, d]`, the last of keys and values `[S, Hkv,
    d]`."""
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    new, length, grouped = len(q), len(k), q.shape[1] != k.shape[1]
    mask = None
    if new not in (1, length):
        mask = torch.ones(new, length, dtype=torch.bool, device=q.device).tril(length - new)
    out = scaled_dot_product_attention(
        queries, keys, values, mask, is_causal=new == length > 1, enable_gqa=grouped
    )
    return out[0].transpose(0, 1)
