"""Contiguous KV cache: one block of memory per sequence, and the attention of a step over several.

Keys are `[Hkv, d, capacity]`, values `[Hkv, capacity, d]`, so that one query reads both in storage
order by two matrix products. With 1,500 bfloat16 tokens on two cores that took 0.53 ms per layer;
keys as `[Hkv, capacity, d]` 1.2 ms, scaled_dot_product_attention 1.8 ms; float32 is the same either
way. A kernel does the same in bfloat16 on a CPU. `kv_paged` has the same interface.

In int8 an element is scale * q, q from -127 to 127, with a float16 scale per token and head. Tokens
of the same step see each other quantized too, so that the result does not depend on the prefill
chunks.
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
"""Up to so many new tokens of a sequence are computed as decodes, without a copy of their keys."""

TENSOR_NAMES = ("keys", "values", "key_scales", "value_scales")
"""Names of the parts of a `ContiguousKV` in a snapshot."""


class ContiguousKV:
    """KV cache of one sequence, a tensor per layer; in int8 also the scales `[Hkv, capacity]`."""

    __slots__ = ("capacity", "key_scales", "keys", "lent", "value_scales", "values")

    def __init__(self, layers: int, empty: Tensor) -> None:
        self.capacity = 0
        self.lent = 0  # tokens that others read; before they are overwritten the tensors are copied
        scales: list[Tensor] = []
        if empty.dtype == torch.int8:
            scales = [empty.new_empty((len(empty), 0), dtype=torch.float16)] * layers
        self.keys, self.key_scales = [empty] * layers, scales
        self.values, self.value_scales = [empty.transpose(1, 2)] * layers, list(scales)

    def tensors(self) -> tuple[tuple[list[Tensor], int], ...]:
        """All tensors by layer, and the dimension of the tokens in each."""
        return (self.keys, 2), (self.values, 1), (self.key_scales, 1), (self.value_scales, 1)

    def resize(self, capacity: int, length: int) -> None:
        """Allocate `capacity` tokens and keep the first `length`; copies one layer at a time."""
        for layers, dim in self.tensors():
            for index, old in enumerate(layers):
                shape = list(old.shape)
                shape[dim] = capacity
                layers[index] = new = old.new_empty(shape)
                new.narrow(dim, 0, length).copy_(old.narrow(dim, 0, length))
        self.capacity, self.lent = capacity, 0

    def export_tensors(self, length: int) -> dict[str, Tensor]:
        """Views of the first `length` tokens of all tensors by name; int8 as uint8."""
        views = {
            f"{name}.{layer}": tensor.narrow(dim, 0, length)
            for name, (layers, dim) in zip(TENSOR_NAMES, self.tensors(), strict=True)
            for layer, tensor in enumerate(layers)
        }
        return {
            name: view.view(torch.uint8) if view.dtype == torch.int8 else view
            for name, view in views.items()
        }

    def addresses(self) -> list[tuple[int, int, int, int]]:
        """Of the keys, the values and their scales (0 without), by layer."""
        keys, values = ([t.data_ptr() for t in layers] for layers in (self.keys, self.values))
        none = [0] * len(keys)
        key_scales, value_scales = (
            [t.data_ptr() for t in layers] or none
            for layers in (self.key_scales, self.value_scales)
        )
        return list(zip(keys, values, key_scales, value_scales, strict=True))

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Write the keys and values `[T, Hkv, d]` of the tokens from `start` on."""
        new = len(k)
        if self.key_scales:
            k, key_scales = quantize_kv(k)
            v, value_scales = quantize_kv(v)
            self.key_scales[layer].narrow(1, start, new).copy_(key_scales.t())
            self.value_scales[layer].narrow(1, start, new).copy_(value_scales.t())
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
    """Keys or values `[T, Hkv, d]` in int8, and their scales `[T, Hkv]`."""
    wide = x.float()
    scale = (wide.abs().amax(-1) / 127).half()
    q = (wide / scale.float()[..., None]).nan_to_num(0.0, 0.0, 0.0).round().clamp(-127, 127)
    return q.to(torch.int8), scale


def bytes_per_token(c: TextConfig, dtype: torch.dtype, *, int8: bool = False) -> int:
    """Bytes of the KV cache of one token."""
    head = c.head_dim + torch.float16.itemsize if int8 else c.head_dim * dtype.itemsize
    return 2 * c.num_layers * c.num_kv_heads * head


def has_attention_kernel(c: TextConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a compiled kernel computes the attention of decodes."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and c.head_dim % kernels.PANEL == 0
        and kernels.unavailable_reason() is None
    )


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens of one sequence in a step: `start` to `stop`."""

    kv: SequenceKV
    start: int
    stop: int


class ContiguousKVCache:
    """The KV memory of all sequences of a model on one device. dtype: of the computation."""

    def __init__(
        self,
        c: TextConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        int8: bool = False,
    ) -> None:
        self.layers = c.num_layers
        kernel = has_attention_kernel(c, dtype, device)
        self._decode_attention = _DecodeAttentionKernel if kernel else _DecodeAttention
        self.bytes_per_token = bytes_per_token(c, dtype, int8=int8)
        self.dtype = torch.int8 if int8 else dtype  # of the storage
        self._empty = torch.empty((c.num_kv_heads, c.head_dim, 0), dtype=self.dtype, device=device)
        self._zero = torch.zeros((), dtype=dtype, device=device)

    def prepare(self, kv: SequenceKV) -> None:
        """Allocate the memory of `kv` up to its capacity."""
        if kv.contiguous is None:
            kv.contiguous = ContiguousKV(self.layers, self._empty)
        if kv.contiguous.capacity != kv.capacity or kv.contiguous.lent > kv.length:
            kv.contiguous.resize(kv.capacity, min(kv.length, kv.contiguous.capacity))

    def copy(self, source: SequenceKV, target: SequenceKV, length: int) -> None:
        """Copy the first `length` tokens from one sequence to another."""
        assert source.contiguous is not None
        assert target.contiguous is not None
        pairs = zip(source.contiguous.tensors(), target.contiguous.tensors(), strict=True)
        for (old, dim), (new, _) in pairs:
            for a, b in zip(old, new, strict=True):
                b.narrow(dim, 0, length).copy_(a.narrow(dim, 0, length))

    def import_tensors(self, tensors: Mapping[str, Tensor], length: int) -> ContiguousKV:
        """The inverse of `export_tensors`; tensors on this device are used without a copy.

        Raises `DataError` for other names, shapes or types.
        """
        return import_tensors(tensors, length, self.layers, self._empty)

    def adopt(self, kv: SequenceKV, contiguous: ContiguousKV) -> None:
        """Make imported memory of all its tokens that of a sequence."""
        kv.contiguous = contiguous

    def lend_tensors(self, kv: SequenceKV, length: int) -> dict[str, Tensor]:
        """As `export_tensors`, and nobody changes them for as long as they are used."""
        assert kv.contiguous is not None
        kv.contiguous.lent = max(kv.contiguous.lent, length)
        return kv.contiguous.export_tensors(length)

    def export_tensors(self, kv: SequenceKV, length: int) -> dict[str, Tensor]:
        """The first `length` tokens of a sequence, as `ContiguousKV.export_tensors`."""
        assert kv.contiguous is not None
        return kv.contiguous.export_tensors(length)

    @property
    def attention(self) -> str:
        """A description of the attention backend."""
        kernel = self._decode_attention is _DecodeAttentionKernel
        return f"{'a kernel' if kernel else 'matmul'} and sdpa over a contiguous KV cache"

    def attend(self, spans: Sequence[Span]) -> AttentionFn:
        """The attention of a step whose flat batch is these spans one after another."""
        parts: list[_DecodeAttention | _PrefillChunkAttention] = [
            (self._decode_attention if is_decode_like(span) else _PrefillChunkAttention)(
                span, self._zero
            )
            for span in spans
        ]
        if len(parts) == 1:
            return parts[0]
        return _ConcatAttention(parts, [span.stop - span.start for span in spans])


def import_tensors(
    tensors: Mapping[str, Tensor], length: int, layers: int, empty: Tensor
) -> ContiguousKV:
    """As `ContiguousKVCache.import_tensors`; `empty` are keys of no token."""
    kv = ContiguousKV(layers, empty.to("meta"))
    kv.resize(length, 0)
    expected, actual = (
        {name: (tuple(t.shape), t.dtype) for name, t in each.items()}
        for each in (kv.export_tensors(length), tensors)
    )
    names = expected.keys() | actual.keys()
    if wrong := sorted(name for name in names if expected.get(name) != actual.get(name)):
        raise DataError(
            f"KV snapshot does not match this model for {length} tokens: {len(wrong)} tensors "
            f"differ in name, shape or dtype (first: {wrong[0][:60]})"
        )
    for name, (meta, _) in zip(TENSOR_NAMES, kv.tensors(), strict=True):
        meta[:] = [
            tensors[f"{name}.{layer}"].view(one.dtype).to(empty.device)
            for layer, one in enumerate(meta)
        ]
    return kv


def is_decode_like(span: Span) -> bool:
    """Whether its tokens are computed as decodes."""
    return span.stop - span.start <= (MAX_DECODE_TOKENS if span.start else 1)


def fused_sequence(span: Span, num_outputs: int | None = None) -> FusedSequence:
    """A span for the fused layers. num_outputs: of the last tokens' hidden states; None: all."""
    kv = span.kv.contiguous
    assert kv is not None
    count = span.stop - span.start
    outputs = count if num_outputs is None else num_outputs
    return FusedSequence(count, span.start, kv.capacity, outputs, kv.addresses())


class _ConcatAttention:
    def __init__(self, parts: Sequence[AttentionFn], lengths: list[int]) -> None:
        self.parts, self.lengths = parts, lengths

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spans = zip(self.parts, *(x.split(self.lengths) for x in (q, k, v)), strict=True)
        return torch.cat([part(layer, *qkv) for part, *qkv in spans])


class _DecodeAttention:
    """A few new tokens against their sequence up to each: two matrix products per token, no copy.

    Token by token, so that each is rounded as it is alone.
    """

    def __init__(self, span: Span, zero: Tensor) -> None:
        assert span.kv.contiguous is not None
        self.kv, self.start, self.stop, self.zero = span.kv.contiguous, span.start, span.stop, zero

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.kv.write(layer, self.start, k, v)
        keys, values = self.kv.read(layer, self.stop, q.dtype)
        stops = range(self.start + 1, self.stop + 1)
        out = [
            self._one(one, keys[..., :stop], values[:, :stop])
            for one, stop in zip(q, stops, strict=True)
        ]
        return out[0][None] if len(out) == 1 else torch.stack(out)

    def _one(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        grouped = q.view(len(keys), -1, q.shape[-1])
        scores = torch.baddbmm(self.zero, grouped, keys, beta=0, alpha=q.shape[-1] ** -0.5)
        return torch.bmm(scores.softmax(-1), values).view(q.shape)


class _DecodeAttentionKernel(_DecodeAttention):
    """`_DecodeAttention` in bfloat16 by a kernel."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv = self.kv
        scales = (kv.key_scales[layer], kv.value_scales[layer]) if kv.key_scales else None
        return kernels.attend(q, k, v, kv.keys[layer], kv.values[layer], self.start, scales)


class _PrefillChunkAttention:
    """Many new tokens: query i of T sees the first S - T + i + 1 of S keys."""

    def __init__(self, span: Span, zero: Tensor) -> None:
        assert span.kv.contiguous is not None
        self.kv, self.start, self.stop = span.kv.contiguous, span.start, span.stop
        self.mask: Tensor | None = None
        if span.start:
            mask = zero.new_full((span.stop - span.start, span.stop), float("-inf"))
            self.mask = mask.triu_(span.start + 1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.kv.write(layer, self.start, k, v)
        if self.mask is None and not self.kv.key_scales:
            return causal(q[None], k[None], v[None])[0]
        keys, values = self.kv.read(layer, self.stop, q.dtype)
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.transpose(1, 2).contiguous()[None],
            values[None],
            attn_mask=self.mask,
            is_causal=self.mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[0].transpose(0, 1)
