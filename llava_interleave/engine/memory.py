"""Keys and values on one device: a contiguous slab a sequence, and the attention of one step over several of them.

Keys lie as `[Hkv, d, capacity]`, values as `[Hkv, capacity, d]`: so one new query reads both in storage order by two plain
matrix products. With 1,500 bfloat16 tokens on two cores that took 0.53 ms a layer; keys as `[Hkv, capacity, d]` 1.2 ms,
scaled_dot_product_attention 1.8 ms; float32 is the same either way. A kernel does the same in bfloat16 on a CPU. Another memory
(paged, for one) needs `prepare`, `copy`, `attend` and `bytes_per_token` of `Slabs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .. import kernels
from ..config import TextConfig
from ..model import Attend
from ..model.attend import causal
from .cache import KV


class Slab:
    """Keys and values of one sequence, a tensor a layer."""

    __slots__ = ("capacity", "keys", "values")

    def __init__(self, layers: int, empty: Tensor) -> None:
        self.capacity = 0
        self.keys = [empty] * layers
        self.values = [empty.transpose(1, 2)] * layers

    def resize(self, capacity: int, length: int) -> None:
        """Make room for `capacity` tokens and keep the first `length`; while it copies, one layer is there twice."""
        for layers, dim in ((self.keys, 2), (self.values, 1)):
            for index, old in enumerate(layers):
                shape = list(old.shape)
                shape[dim] = capacity
                layers[index] = new = old.new_empty(shape)
                new.narrow(dim, 0, length).copy_(old.narrow(dim, 0, length))
        self.capacity = capacity


def bytes_per_token(c: TextConfig, dtype: torch.dtype) -> int:
    """Bytes that the keys and values of one token take."""
    return 2 * c.num_layers * c.num_kv_heads * c.head_dim * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Span:
    """Queries of one sequence in a step: its tokens `start` to `stop`, of which the keys and values are new."""

    kv: KV
    start: int
    stop: int


class Slabs:
    """The memory of all sequences of one model on one device."""

    def __init__(self, c: TextConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.layers = c.num_layers
        compiled = device.type == "cpu" and dtype == torch.bfloat16 and c.head_dim % kernels.PANEL == 0
        self._one: type[_One] = _OneCompiled if compiled and kernels.why_not() is None else _One
        self.bytes_per_token = bytes_per_token(c, dtype)
        self._empty = torch.empty(c.num_kv_heads, c.head_dim, 0, dtype=dtype, device=device)
        self._zero = self._empty.new_zeros(())

    def prepare(self, kv: KV) -> None:
        """Make the memory of `kv` what its capacity says."""
        if kv.slab is None:
            kv.slab = Slab(self.layers, self._empty)
        if kv.slab.capacity != kv.capacity:
            kv.slab.resize(kv.capacity, min(kv.length, kv.slab.capacity))

    def copy(self, source: KV, target: KV, length: int) -> None:
        """Copy the first `length` tokens from one sequence to another."""
        assert source.slab is not None
        assert target.slab is not None
        for name, dim in (("keys", 2), ("values", 1)):
            for old, new in zip(getattr(source.slab, name), getattr(target.slab, name), strict=True):
                new.narrow(dim, 0, length).copy_(old.narrow(dim, 0, length))

    def attend(self, spans: Sequence[Span]) -> Attend:
        """What the network asks in a step whose flat batch is these spans one after another."""
        parts: list[_One | _Chunk] = [
            self._one(s, self._zero) if s.stop - s.start == 1 else _Chunk(s, self._empty) for s in spans
        ]
        return parts[0] if len(parts) == 1 else _Several(parts, [s.stop - s.start for s in spans])


class _Several:
    def __init__(self, parts: Sequence[Attend], lengths: list[int]) -> None:
        self.parts, self.lengths = parts, lengths

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = zip(self.parts, q.split(self.lengths), k.split(self.lengths), v.split(self.lengths), strict=True)
        return torch.cat([part(layer, *piece) for part, *piece in pieces])


class _One:
    """One new token against all of its sequence: two matrix products, no copy."""

    def __init__(self, span: Span, zero: Tensor) -> None:
        assert span.kv.slab is not None
        self.zero = zero
        self.keys, self.values = span.kv.slab.keys, span.kv.slab.values
        self.at, self.stop = span.start, span.stop

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        keys.select(2, self.at).copy_(k[0])
        values.select(1, self.at).copy_(v[0])
        heads, d = keys.shape[0], keys.shape[1]
        grouped = q.view(heads, -1, d)
        scores = torch.baddbmm(self.zero, grouped, keys.narrow(2, 0, self.stop), beta=0, alpha=d**-0.5)
        return torch.bmm(scores.softmax(-1), values.narrow(1, 0, self.stop)).view(q.shape)


class _OneCompiled(_One):
    """`_One` in bfloat16 by a kernel."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.attend(q, k, v, self.keys[layer], self.values[layer], self.at)


class _Chunk:
    """Several new tokens, each seeing all before it: query i of T sees the first S - T + i + 1 of S keys."""

    def __init__(self, span: Span, like: Tensor) -> None:
        assert span.kv.slab is not None
        self.keys, self.values = span.kv.slab.keys, span.kv.slab.values
        self.start, self.stop = span.start, span.stop
        self.mask: Tensor | None = None
        if span.start:
            shape = (span.stop - span.start, span.stop)
            self.mask = torch.full(shape, float("-inf"), dtype=like.dtype, device=like.device).triu_(span.start + 1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values, new = self.keys[layer], self.values[layer], self.stop - self.start
        keys.narrow(2, self.start, new).copy_(k.permute(1, 2, 0))
        values.narrow(1, self.start, new).copy_(v.transpose(0, 1))
        if self.mask is None:
            return causal(q[None], k[None], v[None])[0]
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.narrow(2, 0, self.stop).transpose(1, 2).contiguous()[None],
            values.narrow(1, 0, self.stop)[None],
            attn_mask=self.mask,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[0].transpose(0, 1)
