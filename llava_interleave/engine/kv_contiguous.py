"""Keys and values on one device: a contiguous slab a sequence, and the attention of one step over several of them.

Keys lie as `[Hkv, d, capacity]`, values as `[Hkv, capacity, d]`: so one new query reads both in storage order by two plain
matrix products. With 1,500 bfloat16 tokens on two cores that took 0.53 ms a layer; keys as `[Hkv, capacity, d]` 1.2 ms,
scaled_dot_product_attention 1.8 ms; float32 is the same either way. A kernel does the same in bfloat16 on a CPU. `paged` is
another memory with the same verbs.

In 8 bits a key or value is scale * q, q from -127 to 127, with a scale in float16 for each token and head. What a token sees of
itself and of others in its step is rounded alike, so that it does not matter how a prompt was cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .. import kernels
from ..config import TextConfig
from ..errors import DataError
from ..model import AttentionFn
from ..model.attention import causal
from ..quantization.fused import FusedSequence
from .prefix_cache import SequenceKV

MAX_DECODE_TOKENS = 16
"""New tokens of a sequence that are attended as a single one is, without a copy of what they see; more are part of a prompt."""

PARTS = ("keys", "values", "key_scales", "value_scales")
"""Names of the parts of a slab, where it is stored."""


class ContiguousKV:
    """Keys and values of one sequence, a tensor a layer; in 8 bits also their scales `[Hkv, capacity]`."""

    __slots__ = ("capacity", "key_scales", "keys", "value_scales", "values")

    def __init__(self, layers: int, empty: Tensor) -> None:
        self.capacity = 0
        scales = (
            [empty.new_empty((len(empty), 0), dtype=torch.float16)] * layers
            if empty.dtype == torch.int8
            else []
        )
        self.keys, self.key_scales = [empty] * layers, scales
        self.values, self.value_scales = [empty.transpose(1, 2)] * layers, list(scales)

    def parts(self) -> tuple[tuple[list[Tensor], int], ...]:
        """All tensors, by layer, and which of their dimensions is that of tokens."""
        return (self.keys, 2), (self.values, 1), (self.key_scales, 1), (self.value_scales, 1)

    def resize(self, capacity: int, length: int) -> None:
        """Make room for `capacity` tokens and keep the first `length`; while it copies, one layer is there twice."""
        for layers, dim in self.parts():
            for index, old in enumerate(layers):
                shape = list(old.shape)
                shape[dim] = capacity
                layers[index] = new = old.new_empty(shape)
                new.narrow(dim, 0, length).copy_(old.narrow(dim, 0, length))
        self.capacity = capacity

    def stored(self, length: int) -> dict[str, Tensor]:
        """The first `length` tokens of all tensors, by name: views of this memory, whole numbers as bytes."""
        parts = zip(PARTS, self.parts(), strict=True)
        found = {
            f"{name}.{i}": old.narrow(dim, 0, length)
            for name, (layers, dim) in parts
            for i, old in enumerate(layers)
        }
        return {
            name: old.view(torch.uint8) if old.dtype == torch.int8 else old
            for name, old in found.items()
        }

    def addresses(self) -> list[tuple[int, int, int, int]]:
        """Of the keys, the values and their scales (0 without), by layer."""
        keys, values = ([t.data_ptr() for t in layers] for layers in (self.keys, self.values))
        none = [0] * len(keys)
        by_key, by_value = (
            [t.data_ptr() for t in layers] or none
            for layers in (self.key_scales, self.value_scales)
        )
        return list(zip(keys, values, by_key, by_value, strict=True))

    def put(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Write the keys and values `[T, Hkv, d]` of the tokens from `start` on."""
        new = len(k)
        if self.key_scales:
            k, by_key = quantize_kv(k)
            v, by_value = quantize_kv(v)
            self.key_scales[layer].narrow(1, start, new).copy_(by_key.t())
            self.value_scales[layer].narrow(1, start, new).copy_(by_value.t())
        self.keys[layer].narrow(2, start, new).copy_(k.permute(1, 2, 0))
        self.values[layer].narrow(1, start, new).copy_(v.transpose(0, 1))

    def read(self, layer: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys `[Hkv, d, stop]` and values `[Hkv, stop, d]` of the first `stop` tokens."""
        keys, values = self.keys[layer].narrow(2, 0, stop), self.values[layer].narrow(1, 0, stop)
        if self.key_scales:
            keys = (keys * self.key_scales[layer][:, None, :stop].float()).to(dtype)
            values = (values * self.value_scales[layer][:, :stop, None].float()).to(dtype)
        return keys, values


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values `[T, Hkv, d]` as int8, and their scales `[T, Hkv]`."""
    wide = x.float()
    scale = (wide.abs().amax(-1) / 127).half()
    q = (wide / scale.float()[..., None]).nan_to_num(0.0, 0.0, 0.0).round().clamp(-127, 127)
    return q.to(torch.int8), scale


def bytes_per_token(c: TextConfig, dtype: torch.dtype, *, in_eight_bits: bool = False) -> int:
    """Bytes that the keys and values of one token take."""
    head = c.head_dim + torch.float16.itemsize if in_eight_bits else c.head_dim * dtype.itemsize
    return 2 * c.num_layers * c.num_kv_heads * head


def compiled(c: TextConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel computes the attention of new tokens here."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and c.head_dim % kernels.PANEL == 0
        and kernels.unavailable_reason() is None
    )


@dataclass(frozen=True, slots=True)
class Span:
    """Queries of one sequence in a step: its tokens `start` to `stop`, of which the keys and values are new."""

    kv: SequenceKV
    start: int
    stop: int


class ContiguousKVCache:
    """The memory of all sequences of one model on one device. dtype: of what is computed."""

    def __init__(
        self,
        c: TextConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        in_eight_bits: bool = False,
    ) -> None:
        self.layers = c.num_layers
        self._few: type[_DecodeAttention] = (
            _DecodeAttentionKernel if compiled(c, dtype, device) else _DecodeAttention
        )
        self.bytes_per_token = bytes_per_token(c, dtype, in_eight_bits=in_eight_bits)
        self.dtype = torch.int8 if in_eight_bits else dtype  # that they are kept in
        self._empty = torch.empty((c.num_kv_heads, c.head_dim, 0), dtype=self.dtype, device=device)
        self._zero = torch.zeros((), dtype=dtype, device=device)

    def prepare(self, kv: SequenceKV) -> None:
        """Make the memory of `kv` what its capacity says."""
        if kv.slab is None:
            kv.slab = ContiguousKV(self.layers, self._empty)
        if kv.slab.capacity != kv.capacity:
            kv.slab.resize(kv.capacity, min(kv.length, kv.slab.capacity))

    def copy(self, source: SequenceKV, target: SequenceKV, length: int) -> None:
        """Copy the first `length` tokens from one sequence to another."""
        assert source.slab is not None
        assert target.slab is not None
        for (old, dim), (new, _) in zip(source.slab.parts(), target.slab.parts(), strict=True):
            for a, b in zip(old, new, strict=True):
                b.narrow(dim, 0, length).copy_(a.narrow(dim, 0, length))

    def slab(self, tensors: Mapping[str, Tensor], length: int) -> ContiguousKV:
        """A slab of `length` tokens made of what `Slab.stored` gave: those tensors themselves where they are on this device.

        Raises `DataError` where names, shapes or types are others.
        """
        return contiguous_kv_of(tensors, length, self.layers, self._empty)

    def adopt(self, kv: SequenceKV, slab: ContiguousKV) -> None:
        """Make a slab of all its tokens the memory of a sequence."""
        kv.slab = slab

    def stored(self, kv: SequenceKV, length: int) -> dict[str, Tensor]:
        """The first `length` tokens of a sequence, as `Slab.stored`."""
        assert kv.slab is not None
        return kv.slab.stored(length)

    @property
    def attention(self) -> str:
        """What computes attention, in words."""
        return f"{'a kernel' if self._few is _DecodeAttentionKernel else 'products of matrices'} and sdpa over a slab a sequence"

    def attend(self, spans: Sequence[Span]) -> AttentionFn:
        """What the network asks in a step whose flat batch is these spans one after another."""
        parts: list[_DecodeAttention | _PrefillChunkAttention] = [
            (self._few if is_decode_like(span) else _PrefillChunkAttention)(span, self._zero)
            for span in spans
        ]
        return (
            parts[0]
            if len(parts) == 1
            else _ConcatAttention(parts, [s.stop - s.start for s in spans])
        )


def contiguous_kv_of(
    tensors: Mapping[str, Tensor], length: int, layers: int, empty: Tensor
) -> ContiguousKV:
    """`Slabs.slab`, where keys of no token are like `empty`."""
    made = ContiguousKV(layers, empty.to("meta"))
    made.resize(length, 0)
    right, given = (
        {n: (tuple(t.shape), t.dtype) for n, t in each.items()}
        for each in (made.stored(length), tensors)
    )
    if odd := sorted(
        name for name in right.keys() | given.keys() if right.get(name) != given.get(name)
    ):
        raise DataError(
            f"these are no keys and values of {length} tokens: {len(odd)} tensors are others, first {odd[0][:60]!r}"
        )
    for name, (found, _) in zip(PARTS, made.parts(), strict=True):
        found[:] = [
            tensors[f"{name}.{i}"].view(old.dtype).to(empty.device) for i, old in enumerate(found)
        ]
    return made


def is_decode_like(span: Span) -> bool:
    """Whether tokens are attended as single ones are."""
    return span.stop - span.start <= (MAX_DECODE_TOKENS if span.start else 1)


def fusible(span: Span, asked: int | None = None) -> FusedSequence:
    """A span as the fused layers take it. asked: hidden states of its last so many tokens are wanted; None: of all."""
    slab = span.kv.slab
    assert slab is not None
    count = span.stop - span.start
    return FusedSequence(
        count, span.start, slab.capacity, count if asked is None else asked, slab.addresses()
    )


class _ConcatAttention:
    def __init__(self, parts: Sequence[AttentionFn], lengths: list[int]) -> None:
        self.parts, self.lengths = parts, lengths

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = zip(
            self.parts,
            q.split(self.lengths),
            k.split(self.lengths),
            v.split(self.lengths),
            strict=True,
        )
        return torch.cat([part(layer, *piece) for part, *piece in pieces])


class _DecodeAttention:
    """A few new tokens against all of their sequence up to each, one by one, so that none is rounded otherwise than alone: two
    matrix products, no copy."""

    def __init__(self, span: Span, zero: Tensor) -> None:
        assert span.kv.slab is not None
        self.slab, self.start, self.stop, self.zero = span.kv.slab, span.start, span.stop, zero

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.slab.put(layer, self.start, k, v)
        keys, values = self.slab.read(layer, self.stop, q.dtype)
        seen = range(self.start + 1, self.stop + 1)
        found = [
            self._one(one, keys[..., :stop], values[:, :stop])
            for one, stop in zip(q, seen, strict=True)
        ]
        return found[0][None] if len(found) == 1 else torch.stack(found)

    def _one(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        grouped = q.view(len(keys), -1, q.shape[-1])
        scores = torch.baddbmm(self.zero, grouped, keys, beta=0, alpha=q.shape[-1] ** -0.5)
        return torch.bmm(scores.softmax(-1), values).view(q.shape)


class _DecodeAttentionKernel(_DecodeAttention):
    """`_Few` in bfloat16 by a kernel."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slab = self.slab
        scales = (slab.key_scales[layer], slab.value_scales[layer]) if slab.key_scales else None
        return kernels.attend(q, k, v, slab.keys[layer], slab.values[layer], self.start, scales)


class _PrefillChunkAttention:
    """Several new tokens, each seeing all before it: query i of T sees the first S - T + i + 1 of S keys."""

    def __init__(self, span: Span, like: Tensor) -> None:
        assert span.kv.slab is not None
        self.slab, self.start, self.stop = span.kv.slab, span.start, span.stop
        self.mask: Tensor | None = None
        if span.start:
            self.mask = like.new_full((span.stop - span.start, span.stop), float("-inf")).triu_(
                span.start + 1
            )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.slab.put(layer, self.start, k, v)
        if self.mask is None and not self.slab.key_scales:
            return causal(q[None], k[None], v[None])[0]
        keys, values = self.slab.read(layer, self.stop, q.dtype)
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.transpose(1, 2).contiguous()[None],
            values[None],
            attn_mask=self.mask,
            is_causal=self.mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[0].transpose(0, 1)
