"""Paged KV cache: blocks of one pool, as the attention kernels of GPUs read them.

Same interface as `kv_contiguous`. `BlockAllocator` assigns the blocks. Sequences with a common
prefix share its whole blocks, so that only a partly filled block is copied. In int8, the keys and
values of a layer are dequantized for each step, since no kernel reads them: that takes the memory
of one layer of the sequences in the step in the dtype of the computation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..config import TextConfig
from ..errors import OptionError
from ..model import AttentionFn
from ..model.varlen import KERNELS, VarlenMetadata, choose
from .kv_contiguous import ContiguousKV, Span, bytes_per_token, import_tensors, quantize_kv
from .prefix_cache import SequenceKV

KV_BLOCK_SIZE = 256
"""Tokens per block: FlashAttention 2, also inside PyTorch, needs multiples of 256."""


class PagedKVCache:
    """The KV memory of all sequences of a model on one device: `kv_bytes` of blocks, one padding
    block.

    dtype: of the computation. Raises `OptionError` if the device has not enough memory.
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
        self.kernel = choose(device, dtype, c.head_dim)
        shape = (c.num_layers, 2, self.num_blocks + 1, block_size, c.num_kv_heads)
        try:  # zero-initialized: masked values are multiplied by 0, and 0 * NaN is NaN
            self.pool = torch.zeros((*shape, c.head_dim), dtype=self.dtype, device=device)
            self.scales = torch.zeros(shape, dtype=torch.float16, device=device) if int8 else None
        except torch.OutOfMemoryError as error:
            raise OptionError(
                f"{kv_bytes:,} bytes of KV cache do not fit on {device}: {error}"
            ) from None
        self._compute_dtype = dtype
        self._empty = torch.empty((c.num_kv_heads, c.head_dim, 0), dtype=self.dtype, device=device)

    @property
    def attention(self) -> str:
        """A description of the attention backend."""
        return f"{self.kernel} over a paged KV cache, {self.block_size} tokens per block"

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
        slots = self._slots([(kv, 0, length)])
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
        slots = self._slots([(kv, 0, contiguous.capacity)])
        for layer in range(len(self.pool)):
            keys, values = contiguous.keys[layer], contiguous.values[layer]
            self._write(self.pool[layer], slots, keys.permute(2, 0, 1), values.transpose(0, 1))
            if self.scales is not None:
                scales = contiguous.key_scales[layer], contiguous.value_scales[layer]
                self._write(self.scales[layer], slots, *(scale.t() for scale in scales))

    def attend(self, spans: Sequence[Span]) -> AttentionFn:
        """The attention of a step whose flat batch is these spans one after another."""
        device = self.pool.device
        new, lengths = [span.stop - span.start for span in spans], [span.stop for span in spans]
        slots = self._slots([(span.kv, span.start, span.stop) for span in spans])
        if self.scales is not None:
            kv_slots = self._slots([(span.kv, 0, span.stop) for span in spans])
            return _PagedAttention(self, slots, VarlenMetadata.of(new, lengths, device), kv_slots)
        blocks = [span.kv.blocks[: -(-span.stop // self.block_size)] for span in spans]
        rows = list(zip(*zip_longest(*blocks, fillvalue=self.num_blocks), strict=True))
        table = torch.tensor(rows, dtype=torch.int32, device=device)
        return _PagedAttention(self, slots, VarlenMetadata.of(new, lengths, device, table))

    def attend_decode(self, positions: Tensor, table: Tensor) -> AttentionFn:
        """`attend` for one new token per sequence, at `positions [N]`, in blocks `[N, max_blocks]`.

        Both are int32 on the device. No value is read on the host, so that a step can be captured
        and replayed with other values.
        """
        size = self.block_size
        at = (positions // size).long()
        slots = table.gather(1, at[:, None])[:, 0].long() * size + positions % size
        lengths = positions + 1
        starts = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        count, max_blocks = table.shape
        new = torch.arange(count + 1, dtype=torch.int32, device=table.device)
        varlen = VarlenMetadata(new, starts, lengths, 1, max_blocks * size, table)
        return _PagedAttention(self, slots, varlen)

    def _slots(self, spans: Iterable[tuple[SequenceKV, int, int]]) -> Tensor:
        """Indices of tokens in the pool: of each sequence those from a first to a last."""
        size = self.block_size
        pairs = [(torch.tensor(kv.blocks), torch.arange(start, stop)) for kv, start, stop in spans]
        slots = [blocks[at // size] * size + at % size for blocks, at in pairs]
        return torch.cat(slots).to(self.pool.device)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write the keys and values `[T, Hkv, d]` of tokens."""
        if self.scales is not None:
            k, key_scales = quantize_kv(k)
            v, value_scales = quantize_kv(v)
            self._write(self.scales[layer], slots, key_scales, value_scales)
        self._write(self.pool[layer], slots, k, v)

    def dequantize(self, layer: int, slots: Tensor) -> list[Tensor]:
        """The int8 keys and values of tokens in the dtype of the computation."""
        assert self.scales is not None
        pools = zip(self.pool[layer], self.scales[layer], strict=True)
        flat = ((part.flatten(0, 1)[slots], scales.flatten(0, 1)[slots]) for part, scales in pools)
        return [(part * scales[..., None].float()).to(self._compute_dtype) for part, scales in flat]

    @staticmethod
    def _write(pools: Tensor, slots: Tensor, *rows: Tensor) -> None:
        for pool, new in zip(pools, rows, strict=True):
            pool.flatten(0, 1).index_copy_(0, slots, new)


class _PagedAttention:
    """kv_slots: of all tokens of the sequences, where they have to be dequantized."""

    def __init__(
        self,
        cache: PagedKVCache,
        slots: Tensor,
        varlen: VarlenMetadata,
        kv_slots: Tensor | None = None,
    ) -> None:
        self.cache, self.slots, self.varlen, self.kv_slots = cache, slots, varlen, kv_slots

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        cache.write(layer, self.slots, k, v)
        if self.kv_slots is None:
            keys, values = cache.pool[layer]
        else:
            keys, values = cache.dequantize(layer, self.kv_slots)
        return KERNELS[cache.kernel](q, keys, values, self.varlen)
