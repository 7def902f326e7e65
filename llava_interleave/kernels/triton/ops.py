"""Typed entry points of the Triton kernels: they check shapes and types, and launch.

T tokens of N sequences, H heads in Hkv groups of `head_dim` d; x is float16, bfloat16, or float32.
Everything is computed in float32 and rounded once, to the type of x."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .launch import counted


class LayerKV(NamedTuple):
    """The paged KV cache of one layer: keys and values `[blocks, block_size, Hkv, d]` in the type
    of x, or int8 with float16 scales `[blocks, block_size, Hkv]`."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


class PackedWeight(NamedTuple):
    """An int4 or int8 weight `[out, in]` of `quantization.packing`, in the order in which the
    kernel reads it; panels of 16 outputs, groups of 128 inputs.

    words: int32 `[panels, groups, 16, 16 or 32]`. With 8 bits byte j of word i is q + 128 of input
    32 j + i. With 4 bits nibbles j and j + 4 of word i are inputs 32 j + 2 i and 32 j + 2 i + 1.
    scales: float16 `[panels, groups, 16]`. sub_scales: with 4 bits, int32 `[panels, groups, 16]`,
    byte j is sub_scale + 16 * zero_point of inputs 32 j to 32 j + 31."""

    words: Tensor
    scales: Tensor
    sub_scales: Tensor | None
    out_features: int
    in_features: int


class SamplingTensors(NamedTuple):
    """`options.SamplingParams` of N rows, each a tensor `[N]`, float32 where not said.

    top_k: int32. uniform: float64, a random number from [0, 1) per row (`Sampler.generator`).
    state_rows: int32, the row of `state` of a sequence with penalties; -1: none.
    state: int32 `[rows, vocab]`; how often each token was generated, plus `PROMPT_TOKEN` if the
    prompt has it. A call adds the tokens that it samples.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    uniform: Tensor
    state_rows: Tensor
    state: Tensor | None


def rope_table(positions: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Cosines and sines of RoPE (`model.qwen2.rotary`) of positions below `positions`: float32
    `[positions, d]`, d / 2 cosines, then d / 2 sines."""
    powers = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    at = torch.arange(positions, device=device, dtype=torch.float32)
    angles = at[:, None] * (1.0 / theta**powers)
    return torch.cat([angles.cos(), angles.sin()], 1)


def add_rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h = x + residual; y = h / sqrt(mean(h^2) + eps) * weight. Returns y and h, `[T, D]`.

    Without a residual h is x. One launch."""
    if counted("add_rms_norm", x):
        return torch.empty_like(x), x if residual is None else torch.empty_like(x)
    return reference.add_rms_norm(x, weight, eps, residual)


def add_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h = x + residual; y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias. Returns y and h,
    `[T, D]`. One launch."""
    if counted("add_layer_norm", x):
        return torch.empty_like(x), x if residual is None else torch.empty_like(x)
    return reference.add_layer_norm(x, weight, bias, eps, residual)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of `[T, 2 I]`, gate first -> `[T, I]`. One launch."""
    if counted("silu_mul", gate_up):
        return gate_up.chunk(2, -1)[0]
    return reference.silu_mul(gate_up)


def rotary_kv_write(
    qkv: Tensor, positions: Tensor, slots: Tensor, rope: Tensor, kv: LayerKV, num_heads: int
) -> Tensor:
    """Rotates q and k, writes k and v to the cache, returns q `[T, H, d]`.

    qkv: `[T, (H + 2 Hkv) d]`, the output of the merged projection. positions: int32 `[T]`. slots:
    int32 `[T]`, block * block_size + place in it; negative: not written. rope: of `rope_table`.
    An int8 cache is written as `engine.kv_contiguous.quantize_kv` rounds. One launch."""
    if counted("rotary_kv_write", qkv):
        return qkv.new_empty(len(qkv), num_heads, kv.keys.shape[-1])
    return reference.rotary_kv_write(qkv, positions, slots, rope, kv, num_heads)


def paged_decode(q: Tensor, kv: LayerKV, block_table: Tensor, seqlens: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of one query per sequence, `[N, H, d]`, over its first `seqlens`
    tokens.

    block_table: int32 `[N, max_blocks]`. seqlens: int32 `[N]`; of 0 the output is 0. The keys of a
    sequence are split into parts of a fixed length, so that an answer does not depend on the
    batch. No value is read on the host. Two launches."""
    if counted("paged_decode", q) and counted("reduce", q):
        return torch.empty_like(q)
    starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    return reference.paged_attention(q, kv, block_table, starts, seqlens)


def paged_attention(
    q: Tensor,
    kv: LayerKV,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    max_seqlen_q: int,
) -> Tensor:
    """Causal attention of several queries per sequence, its last tokens, over its cache: q `[T, H,
    d]` -> `[T, H, d]`.

    block_table: int32 `[N, max_blocks]`. cu_seqlens_q: int32 `[N + 1]`. seqlens_k: int32 `[N]`, all
    tokens of each. max_seqlen_q: an upper bound. One launch."""
    assert max_seqlen_q > 0
    if counted("attention", q):
        return torch.empty_like(q)
    return reference.paged_attention(q, kv, block_table, cu_seqlens_q, seqlens_k)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    *,
    causal: bool = True,
) -> Tensor:
    """Attention within each of several packed sequences: q `[T, H, d]`, k and v `[S, Hkv, d]` ->
    `[T, H, d]`; the last dimension is contiguous, the others may have any stride.

    cu_seqlens: int32 `[N + 1]`. causal: queries are the last tokens of their sequence. One launch.
    No gradient: training uses PyTorch's SDPA."""
    assert max_seqlen_q > 0
    if counted("attention", q):
        return torch.empty_like(q)
    return reference.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)


def packed_linear(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x w^T + bias, `[T, in]` -> `[T, out]`. Up to two launches; with many rows the weight is
    dequantized by one, and cuBLAS multiplies."""
    if counted("packed_linear", x) and counted("reduce", x):
        return x.new_empty(len(x), w.out_features)
    return reference.packed_linear(x, w, bias)


def dequantize(w: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight `[out, in]`. One launch."""
    if counted("dequantize", w.words):
        return w.words.new_empty(w.out_features, w.in_features, dtype=dtype)
    return reference.dequantize(w, dtype)


def sample(logits: Tensor, p: SamplingTensors) -> Tensor:
    """The next token of each row, int64 `[N]`, by logits `[N, vocab]` (-inf: never sampled), as
    `engine.sampler.Sampler` defines it: penalties, then argmax (temperature 0; the first of equals)
    or temperature, top-k, top-p, min-p and a draw. Tokens equal to the last one kept are kept too.

    Bias and structured output come before: change the logits. No value is read on the host."""
    if counted("sample", logits):
        return logits.new_empty(len(logits), dtype=torch.int64)
    return reference.sample(logits, p)
