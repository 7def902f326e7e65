"""Keys and values in blocks of one pool, as the attention kernels of GPUs read them; the verbs are those of `memory.Slabs`.

The account (`cache.Pages`) says which blocks a sequence has. Sequences that begin alike have their first blocks in common, so
that a prefix found again is not copied; only a block that is not full is. In 8 bits a layer's keys and values are unpacked for
each step, as no kernel reads them so: that takes what one layer of the sequences in the step would in the type computed in.
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
from .kv_contiguous import ContiguousKV, Span, bytes_per_token, contiguous_kv_of, quantize_kv
from .prefix_cache import SequenceKV

KV_BLOCK_SIZE = 256
"""Tokens of a block: flash attention 2, also inside PyTorch, takes multiples of 256 only."""


class PagedKVCache:
    """The memory of all sequences of one model on one device: as many blocks as `kv_bytes` hold, and one that nobody reads.

    dtype: of what is computed. Raises `OptionError` where the device has no room for them.
    """

    def __init__(
        self,
        c: TextConfig,
        dtype: torch.dtype,
        device: torch.device,
        kv_bytes: int,
        *,
        block: int = KV_BLOCK_SIZE,
        in_eight_bits: bool = False,
    ) -> None:
        self.bytes_per_token = bytes_per_token(c, dtype, in_eight_bits=in_eight_bits)
        self.dtype = torch.int8 if in_eight_bits else dtype  # that they are kept in
        self.block, self.count = block, kv_bytes // (block * self.bytes_per_token)
        self.kernel = choose(device, dtype, c.head_dim)
        shape = (c.num_layers, 2, self.count + 1, block, c.num_kv_heads)
        try:  # in noughts: what a kernel masks it multiplies by 0, which is nought for numbers only
            self.pool = torch.zeros((*shape, c.head_dim), dtype=self.dtype, device=device)
            self.scales = (
                torch.zeros(shape, dtype=torch.float16, device=device) if in_eight_bits else None
            )
        except torch.OutOfMemoryError as error:
            raise OptionError(
                f"{kv_bytes:,} bytes of keys and values have no room on {device}: {error}"
            ) from None
        self._computed = dtype
        self._empty = torch.empty((c.num_kv_heads, c.head_dim, 0), dtype=self.dtype, device=device)

    @property
    def attention(self) -> str:
        """What computes attention, in words."""
        return f"{self.kernel} over blocks of {self.block} tokens"

    def prepare(self, kv: SequenceKV) -> None:
        """Nothing: the account has given it its blocks."""

    def copy(self, source: SequenceKV, target: SequenceKV, length: int) -> None:
        """Copy the first `length` tokens from one sequence to another, but for the blocks that they have in common."""
        pairs = zip(source.blocks[: -(-length // self.block)], target.blocks, strict=False)
        for old, new in (pair for pair in pairs if pair[0] != pair[1]):
            for part in (self.pool,) if self.scales is None else (self.pool, self.scales):
                part[:, :, new] = part[:, :, old]

    def stored(self, kv: SequenceKV, length: int) -> dict[str, Tensor]:
        """The first `length` tokens of a sequence, a copy, as `Slab.stored` gives them."""
        slots = self._slots([(kv, 0, length)])
        found = ContiguousKV(len(self.pool), self._empty)
        found.resize(length, 0)
        for layer in range(len(self.pool)):
            keys, values = (part.flatten(0, 1)[slots] for part in self.pool[layer])
            found.keys[layer], found.values[layer] = (
                keys.permute(1, 2, 0).contiguous(),
                values.transpose(0, 1).contiguous(),
            )
            if self.scales is not None:
                by_key, by_value = (
                    part.flatten(0, 1)[slots].t().contiguous() for part in self.scales[layer]
                )
                found.key_scales[layer], found.value_scales[layer] = by_key, by_value
        return found.stored(length)

    def slab(self, tensors: Mapping[str, Tensor], length: int) -> ContiguousKV:
        """As `Slabs.slab`."""
        return contiguous_kv_of(tensors, length, len(self.pool), self._empty)

    def adopt(self, kv: SequenceKV, slab: ContiguousKV) -> None:
        """Write a slab of all its tokens to the blocks of a sequence."""
        slots = self._slots([(kv, 0, slab.capacity)])
        for layer in range(len(self.pool)):
            self._write(
                self.pool[layer],
                slots,
                slab.keys[layer].permute(2, 0, 1),
                slab.values[layer].transpose(0, 1),
            )
            if self.scales is not None:
                self._write(
                    self.scales[layer],
                    slots,
                    slab.key_scales[layer].t(),
                    slab.value_scales[layer].t(),
                )

    def attend(self, spans: Sequence[Span]) -> AttentionFn:
        """What the network asks in a step whose flat batch is these spans one after another."""
        device, used = (
            self.pool.device,
            [span.kv.blocks[: -(-span.stop // self.block)] for span in spans],
        )
        new, lengths = [span.stop - span.start for span in spans], [span.stop for span in spans]
        slots = self._slots([(span.kv, span.start, span.stop) for span in spans])
        if self.scales is not None:
            held = self._slots([(span.kv, 0, span.stop) for span in spans])
            return _Step(self, slots, VarlenMetadata.of(new, lengths, device), held)
        rows = list(zip(*zip_longest(*used, fillvalue=self.count), strict=True))
        table = torch.tensor(rows, dtype=torch.int32, device=device)
        return _Step(self, slots, VarlenMetadata.of(new, lengths, device, table))

    def attend_next(self, positions: Tensor, table: Tensor) -> AttentionFn:
        """`attend` for one new token of each sequence, at `positions [N]`, in its blocks `[N, most]`, both int32 on the device.
        Nothing asks what they hold, so that a step can be captured and run again with other numbers in them."""
        at = (positions // self.block).long()
        slots = table.gather(1, at[:, None])[:, 0].long() * self.block + positions % self.block
        lengths = positions + 1
        starts = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        count, most = table.shape
        new = torch.arange(count + 1, dtype=torch.int32, device=table.device)
        return _Step(self, slots, VarlenMetadata(new, starts, lengths, 1, most * self.block, table))

    def _slots(self, spans: Iterable[tuple[SequenceKV, int, int]]) -> Tensor:
        """Rows of the pool where the tokens of sequences lie, of each from a first to a last."""
        found = [(torch.tensor(kv.blocks), torch.arange(start, stop)) for kv, start, stop in spans]
        rows = [blocks[at // self.block] * self.block + at % self.block for blocks, at in found]
        return torch.cat(rows).to(self.pool.device)

    def put(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write the keys and values `[T, Hkv, d]` of tokens."""
        if self.scales is not None:
            k, by_key = quantize_kv(k)
            v, by_value = quantize_kv(v)
            self._write(self.scales[layer], slots, by_key, by_value)
        self._write(self.pool[layer], slots, k, v)

    def unpacked(self, layer: int, slots: Tensor) -> list[Tensor]:
        """The keys and the values of tokens in 8 bits, in the type computed in."""
        assert self.scales is not None
        parts = zip(self.pool[layer], self.scales[layer], strict=True)
        flat = ((part.flatten(0, 1)[slots], scales.flatten(0, 1)[slots]) for part, scales in parts)
        return [(part * scales[..., None].float()).to(self._computed) for part, scales in flat]

    @staticmethod
    def _write(parts: Tensor, slots: Tensor, *rows: Tensor) -> None:
        for part, new in zip(parts, rows, strict=True):
            part.flatten(0, 1).index_copy_(0, slots, new)


class _Step:
    """held: rows of the pool with all that the sequences have, where it is to be unpacked."""

    def __init__(
        self,
        memory: PagedKVCache,
        slots: Tensor,
        metadata: VarlenMetadata,
        held: Tensor | None = None,
    ) -> None:
        self.memory, self.slots, self.metadata, self.held = memory, slots, metadata, held

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        memory = self.memory
        memory.put(layer, self.slots, k, v)
        keys, values = (
            memory.pool[layer] if self.held is None else memory.unpacked(layer, self.held)
        )
        return KERNELS[memory.kernel](q, keys, values, self.metadata)
