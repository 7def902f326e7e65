"""The formula of every kernel in PyTorch's operators: the oracle of the tests, in any float type,
and the fallback where no kernel runs. Slow; arguments and shapes as in `ops`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, silu

if TYPE_CHECKING:
    from .ops import LayerKV, PackedWeight, Product, SamplingTensors


def finished(x: Tensor | Product) -> Tensor:
    """A product with its splits, bias and scale, at least in float32."""
    if isinstance(x, Tensor):
        return _wide(x)
    sums = _wide(x.sums)
    y = sums.sum(0) if sums.dim() == 3 else sums
    y = y if x.bias is None else y + _wide(x.bias)
    return y if x.scale is None else y * x.scale[:, None]


def add_rms_norm(
    x: Tensor | Product, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    h = _residual(x, weight, residual)
    wide = _wide(h)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * _wide(weight)
    return y.to(weight.dtype), h


def add_layer_norm(
    x: Tensor | Product, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    h = _residual(x, weight, residual)
    y = layer_norm(_wide(h), h.shape[-1:], _wide(weight), _wide(bias), eps)
    return y.to(weight.dtype), h


def _residual(x: Tensor | Product, weight: Tensor, residual: Tensor | None) -> Tensor:
    if residual is None:
        assert isinstance(x, Tensor)
        return x
    return (finished(x) + residual).to(residual_dtype(weight.dtype))


def residual_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the residual stream of a network that computes in `dtype`."""
    return torch.float32 if dtype == torch.float16 else dtype


def silu_mul(gate_up: Tensor | Product) -> Tensor:
    gate, up = finished(gate_up).chunk(2, -1)
    return (silu(gate) * up).to(gate_up.dtype)


def scale_rows(x: Tensor | Product, *, gated: bool) -> tuple[Tensor, Tensor]:
    wide = finished(x)
    if gated:
        gate, up = wide.chunk(2, -1)
        wide = silu(gate) * up
    scale = power_of_two_above(wide.abs().sum(-1)).to(wide.dtype)
    return (wide / scale[:, None]).to(x.dtype), scale


def power_of_two_above(x: Tensor) -> Tensor:
    """The smallest power of two above a number, float32; 2 for 0."""
    bits = x.float().view(torch.int32) & 0x7F800000
    powers = bits.view(torch.float32).masked_fill(bits == 0, 1.0)
    return 2 * powers.masked_fill(x.isnan(), torch.nan)


def rotary_kv_write(
    qkv: Tensor | Product,
    positions: Tensor,
    slots: Tensor,
    rope: Tensor,
    kv: LayerKV,
    num_heads: int,
) -> Tensor:
    kv_heads, d = kv.keys.shape[2:]
    heads = finished(qkv).unflatten(-1, (-1, d))
    q, k, v = heads.split([num_heads, kv_heads, kv_heads], 1)
    cos, sin = rope[positions.long()][:, None].to(heads.dtype).chunk(2, -1)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(qkv.dtype)

    written = slots >= 0
    at = slots[written].long()
    rows = ((kv.keys, kv.key_scales, rotate(k)), (kv.values, kv.value_scales, v.to(qkv.dtype)))
    for pool, scales, new in rows:
        new = new[written]
        if scales is not None:
            new, scale = _quantize(new)
            scales.flatten(0, 1)[at] = scale.to(scales.dtype)
        pool.flatten(0, 1)[at] = new
    return rotate(q)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 and float16 scales, the largest of a head becomes 127 (`engine.kv_contiguous`)."""
    scale = (_wide(x).abs().amax(-1) / 127).half()
    q = (_wide(x) / scale[..., None].to(_wide(x).dtype)).nan_to_num(0.0, 0.0, 0.0).round()
    return q.clamp(-127, 127).to(torch.int8), scale


def paged_attention(
    q: Tensor, kv: LayerKV, block_table: Tensor, cu_seqlens_q: Tensor, seqlens_k: Tensor
) -> Tensor:
    out = torch.zeros_like(q)
    starts, size = cu_seqlens_q.tolist(), kv.keys.shape[1]
    for number, length in enumerate(seqlens_k.tolist()):
        blocks = block_table[number, : -(-length // size)].long()
        k, v = (
            _dequantized(pool, scales, blocks, q.dtype)[:length]
            for pool, scales in ((kv.keys, kv.key_scales), (kv.values, kv.value_scales))
        )
        rows = slice(starts[number], starts[number + 1])
        if length and starts[number] < starts[number + 1]:
            out[rows] = attention(q[rows], k, v, causal=True)
    return out


def _dequantized(pool: Tensor, scales: Tensor | None, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    tokens = pool[blocks].flatten(0, 1)
    if scales is None:
        return tokens
    wide = torch.promote_types(dtype, torch.float32)
    return tokens.to(wide) * scales[blocks].flatten(0, 1)[..., None].to(wide)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool
) -> Tensor:
    rows, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    parts = [
        attention(q[a:b], k[c:d], v[c:d], causal=causal)
        for a, b, c, d in zip(rows, rows[1:], keys, keys[1:], strict=False)
    ]
    return torch.cat(parts)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of one sequence: q `[T, H, d]`, the last T of S tokens if causal,
    k and v `[S, Hkv, d]`."""
    group = q.shape[1] // k.shape[1]
    k, v = (_wide(x).repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", _wide(q), k) * q.shape[-1] ** -0.5
    if causal:
        later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(later.triu(len(k) - len(q) + 1), -torch.inf)
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v).to(q.dtype)


def dequantize(w: PackedWeight, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    bits = 4 if w.sub_scales is not None else 8
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=w.words.device)
    fields = (w.words[..., None] >> shifts) & (2**bits - 1)  # [out, groups, units, 4, 32 / bits]
    q = fields.transpose(-1, -2).flatten(-2).to(wide)  # number t of word i is input 4 t + i
    if w.sub_scales is None:
        q = q - 128
    else:
        sub_scale, zero_point = (w.sub_scales & 15).to(wide), (w.sub_scales >> 4).to(wide)
        q = sub_scale[..., None] * (q - zero_point[..., None])
    rows = (q.flatten(2) * w.scales[..., None].to(wide)).flatten(1)
    return rows[: w.out_features, : w.in_features].to(dtype)


def packed_linear(x: Tensor, w: PackedWeight, bias: Tensor | None) -> Tensor:
    y = _wide(x) @ dequantize(w, _wide(x).dtype).t()
    return (y if bias is None else y + bias).to(x.dtype)


def sample(logits: Tensor, p: SamplingTensors) -> Tensor:
    rows = [_sample_row(row, p, index) for index, row in enumerate(logits)]
    return torch.tensor(rows, dtype=torch.int64, device=logits.device)


def _sample_row(logits: Tensor, p: SamplingTensors, row: int) -> int:
    scores = _wide(logits).clone()
    state = int(p.state_rows[row])
    if state >= 0:
        assert p.state is not None
        seen = p.state[state]
        counts = (seen & ~PROMPT_TOKEN).to(scores.dtype)
        penalty = p.repetition_penalty[row].to(scores.dtype)
        penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(seen != 0, penalized, scores)
        subtracted = p.presence_penalty[row] + p.frequency_penalty[row] * counts
        scores = torch.where(counts > 0, scores - subtracted, scores)
    if p.temperature[row] == 0:
        token = int(scores.argmax())
    else:
        scores = scores / p.temperature[row]
        if 0 < p.top_k[row] < len(scores):
            scores = _at_least(scores, scores.topk(int(p.top_k[row])).values[-1])
        if p.top_p[row] < 1:
            probabilities, _ = scores.softmax(-1).sort(descending=True)
            inside = probabilities.cumsum(-1) - probabilities < p.top_p[row]
            last = max(int(inside.sum()), 1) - 1
            scores = _at_least(scores, scores.sort(descending=True).values[last])
        if p.min_p[row] > 0:
            scores = _at_least(scores, scores.max() + p.min_p[row].log())
        cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        at = p.uniform[row] * cumulative[-1]
        token = int((cumulative > at).int().argmax())
    if state >= 0:
        assert p.state is not None
        p.state[state, token] += 1
    return token


PROMPT_TOKEN = 1 << 30
"""Bit of a token's `SamplingTensors.state` that the prompt has it."""


def _at_least(scores: Tensor, minimum: Tensor) -> Tensor:
    return scores.masked_fill(scores < minimum, -torch.inf)


def _wide(x: Tensor) -> Tensor:
    """At least float32, as the kernels compute."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
