"""Typed entry points of the Triton kernels: they check shapes and types, and launch.

T tokens of N sequences, H heads in Hkv groups of `head_dim` d; x is float16, bfloat16, or float32.
Everything is computed in float32 and rounded once, to the type of x."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .launch import SHARED_MEMORY, capability, launch, multiprocessors, runs_kernel

KEYS_PER_PART = 256
"""Keys of a sequence that one program of `paged_decode` reads: fixed, so that the rounding of an
answer does not depend on the batch."""
QUERIES_PER_PROGRAM = 64
"""Of the other attention: one size, for the same reason."""
MAX_FUSED_ROWS = 256
"""Rows up to which a product dequantizes in registers. Beyond, dequantizing into memory (some 5
bytes per weight) and cuBLAS are faster by estimate: its rate is more than twice that of the fused
product."""


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
    if not runs_kernel(x):
        return reference.add_rms_norm(x, weight, eps, residual)
    return _norm("elementwise.add_rms_norm", x, residual, (weight,), eps)


def add_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h = x + residual; y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias. Returns y and h,
    `[T, D]`. One launch."""
    if not runs_kernel(x):
        return reference.add_layer_norm(x, weight, bias, eps, residual)
    return _norm("elementwise.add_layer_norm", x, residual, (weight, bias), eps)


def _norm(
    name: str, x: Tensor, residual: Tensor | None, parameters: tuple[Tensor, ...], eps: float
) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    assert x.stride(1) == 1 and all(p.shape == (width,) for p in parameters), x.shape
    assert residual is None or (residual.shape == x.shape and residual.stride(1) == 1)
    y = x.new_empty(rows, width)
    h = x if residual is None else torch.empty_like(y)
    block = _power(width)
    strides = x.stride(0), 0 if residual is None else residual.stride(0)
    launch(
        name,
        (rows,),
        *(x, residual, *parameters, y, h, *strides, eps),
        num_warps=min(max(block // 512, 1), 16),
        D=width,
        BLOCK=block,
    )
    return y, h


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of `[T, 2 I]`, gate first -> `[T, I]`. One launch."""
    if not runs_kernel(gate_up):
        return reference.silu_mul(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1, gate_up.stride()
    y = gate_up.new_empty(rows, width)
    block = min(_power(width), 1024)
    grid = (rows, -(-width // block))
    launch("elementwise.silu_mul", grid, gate_up, y, gate_up.stride(0), D=width, BLOCK=block)
    return y


def rotary_kv_write(
    qkv: Tensor, positions: Tensor, slots: Tensor, rope: Tensor, kv: LayerKV, num_heads: int
) -> Tensor:
    """Rotates q and k, writes k and v to the cache, returns q `[T, H, d]`.

    qkv: `[T, (H + 2 Hkv) d]`, the output of the merged projection. positions: int32 `[T]`. slots:
    int32 `[T]`, block * block_size + place in it; negative: not written. rope: of `rope_table`.
    An int8 cache is written as `engine.kv_contiguous.quantize_kv` rounds. One launch."""
    if not runs_kernel(qkv):
        return reference.rotary_kv_write(qkv, positions, slots, rope, kv, num_heads)
    tokens, (kv_heads, d) = len(qkv), kv.keys.shape[2:]
    assert qkv.shape[1] == (num_heads + 2 * kv_heads) * d and qkv.stride(1) == 1, qkv.shape
    assert rope.shape[1] == d and all(t is None or t.is_contiguous() for t in kv), rope.shape
    q = qkv.new_empty(tokens, num_heads, d)
    block = min(_power(num_heads), 8)
    launch(
        "elementwise.rotary_kv_write",
        (tokens, -(-num_heads // block) + -(-kv_heads // block)),
        *(qkv, positions, slots, rope, q, kv.keys, kv.values, kv.key_scales, kv.value_scales),
        qkv.stride(0),
        D=d,
        HALF=_power(d // 2),
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        BLOCK=block,
        num_warps=2,
    )
    return q


def paged_decode(q: Tensor, kv: LayerKV, block_table: Tensor, seqlens: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of one query per sequence, `[N, H, d]`, over its first `seqlens`
    tokens.

    block_table: int32 `[N, max_blocks]`. seqlens: int32 `[N]`; of 0 the output is 0. The keys of a
    sequence are split into parts of a fixed length (Flash-Decoding), so that an answer does not
    depend on the batch. No value is read on the host. Two launches."""
    if not runs_kernel(q):
        starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
        return reference.paged_attention(q, kv, block_table, starts, seqlens)
    _check_paged(q, kv, block_table)
    (rows, heads, d), (size, kv_heads) = q.shape, kv.keys.shape[1:3]
    parts = -(-block_table.shape[1] * size // KEYS_PER_PART)
    sums = q.new_empty((rows, heads, parts, d), dtype=torch.float32)
    logs = q.new_empty((rows, heads, parts), dtype=torch.float32)
    out = torch.empty_like(q)
    # programs beyond four per multiprocessor would mostly find their sequence too short
    programs = min(parts, -(-4 * multiprocessors(q) // (rows * kv_heads)))
    d1, d2 = _split_head(d)
    launch(
        "attention.decode_parts",
        (programs, rows, kv_heads),
        *(q, *kv, block_table, seqlens, sums, logs, _scale(d)),
        *(kv.keys.stride(1), kv.values.stride(1), block_table.stride(0), parts),
        num_warps=4 if d <= 64 else 8,
        num_stages=2 if SHARED_MEMORY[capability(q)] < 128 else 5,
        GROUP=heads // kv_heads,
        KV_HEADS=kv_heads,
        PAGE=size,
        D=d,
        D1=d1,
        D2=d2,
        PART=KEYS_PER_PART,
        BLOCK_M=max(16, _power(heads // kv_heads)),
        BLOCK_N=64,
    )
    launch(
        "attention.decode_reduce",
        (rows, heads),
        *(sums, logs, seqlens, out, parts),
        HEADS=heads,
        D=d,
        PADDED=_power(d),
        PART=KEYS_PER_PART,
        BLOCK=16,
    )
    return out


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
    if not runs_kernel(q):
        return reference.paged_attention(q, kv, block_table, cu_seqlens_q, seqlens_k)
    _check_paged(q, kv, block_table)
    return _attention(
        q, kv, block_table, cu_seqlens_q, seqlens_k, max_seqlen_q, kv.keys.shape[1], causal=True
    )


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
    `[T, H, d]`. Tokens may have any stride, as in a merged projection; heads are contiguous.

    cu_seqlens: int32 `[N + 1]`. causal: queries are the last tokens of their sequence. One launch.
    No gradient: training uses PyTorch's SDPA."""
    if not runs_kernel(q):
        return reference.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)
    assert all(x.stride()[1:] == (x.shape[2], 1) for x in (q, k, v)), (q.stride(), k.stride())
    return _attention(
        q, LayerKV(k, v), None, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, 1, causal=causal
    )


def _attention(
    q: Tensor,
    kv: LayerKV,
    table: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    max_seqlen_q: int,
    page: int,
    *,
    causal: bool,
) -> Tensor:
    (_, heads, d), kv_heads = q.shape, kv.keys.shape[-2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d1, d2 = _split_head(d)
    launch(
        "attention.attention",
        (-(-max_seqlen_q // QUERIES_PER_PROGRAM), heads, len(cu_q) - 1),
        *(q, *kv, table, cu_q, cu_k, out, _scale(d), q.stride(0)),
        *(kv.keys.stride(-3), kv.values.stride(-3), 0 if table is None else table.stride(0)),
        HEADS=heads,
        KV_HEADS=kv_heads,
        PAGE=page,
        D=d,
        D1=d1,
        D2=d2,
        CAUSAL=causal,
        BLOCK_M=QUERIES_PER_PROGRAM,
        BLOCK_N=64 if d <= 64 or capability(q) == 90 else 32,
    )
    return out


def packed_linear(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x w^T + bias, `[T, in]` -> `[T, out]`; x is float16 or bfloat16.

    One launch, or two where the inputs are split over programs because the outputs are too few for
    the GPU. Beyond `MAX_FUSED_ROWS` the weight is dequantized by one launch, and cuBLAS
    multiplies."""
    if not runs_kernel(x):
        return reference.packed_linear(x, w, bias)
    rows, groups, out = len(x), w.words.shape[1], w.out_features
    assert x.dtype in (torch.float16, torch.bfloat16), x.dtype
    assert x.shape[1] == w.in_features and x.stride(1) == 1, (x.shape, w.in_features)
    if rows > MAX_FUSED_ROWS:
        return torch.nn.functional.linear(x, dequantize(w, x.dtype), bias)
    block_m = min(max(16, _power(rows)), 64)
    block_n = 32 if out < 64 * multiprocessors(x) else 64
    # of 4 groups at least; independent of the rows, since splits change the rounding
    splits = max(1, min(2 * multiprocessors(x) // -(-out // block_n), groups // 4))
    per_split = -(-groups // splits)
    splits = -(-groups // per_split)
    if block_m == 64 and w.sub_scales is not None:
        block_n = 32  # with 64, registers are spilled on sm_86 and sm_89
    y = x.new_empty(rows, out)
    sums = y if splits == 1 else x.new_empty((splits, rows, out), dtype=torch.float32)
    launch(
        "linear.packed_linear",
        (-(-out // block_n), -(-rows // block_m), splits),
        *(x, w.words, w.scales, w.sub_scales, bias if splits == 1 else None, sums),
        *(rows, w.in_features, out, groups, per_split, x.stride(0)),
        num_warps=4 if block_m < 64 else 8,
        num_stages=4 if block_m < 64 else 2,
        BITS=8 if w.sub_scales is None else 4,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SPLIT=splits > 1,
    )
    if splits > 1:
        arguments = (sums, bias, y, splits, y.numel(), out)
        launch("linear.reduce_splits", (-(-y.numel() // 512),), *arguments, BLOCK=512)
    return y


def dequantize(w: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight `[out, in]`. One launch."""
    if not runs_kernel(w.scales):
        return reference.dequantize(w, dtype)
    y = torch.empty(w.out_features, w.in_features, dtype=dtype, device=w.words.device)
    launch(
        "linear.dequantize",
        (-(-w.out_features // 64), w.words.shape[1]),
        *(w.words, w.scales, w.sub_scales, y, w.in_features, w.out_features, w.words.shape[1]),
        BITS=8 if w.sub_scales is None else 4,
        BLOCK_N=64,
    )
    return y


def sample(logits: Tensor, p: SamplingTensors) -> Tensor:
    """The next token of each row, int64 `[N]`, by logits `[N, vocab]` (-inf: never sampled), as
    `engine.sampler.Sampler` defines it: penalties, then argmax (temperature 0; the first of equals)
    or temperature, top-k, top-p, min-p and a draw. Tokens equal to the last one kept are kept too.

    Bias and structured output come before: change the logits. No value is read on the host. Two
    launches."""
    if not runs_kernel(logits):
        return reference.sample(logits, p)
    rows, vocab = logits.shape
    assert logits.stride(1) == 1, logits.stride()
    assert p.state is None or p.state.shape[1] == vocab, p.state.shape
    block = 2048
    blocks = -(-vocab // block)
    scores = torch.empty(rows, vocab, dtype=torch.float32, device=logits.device)
    maxima = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    penalties = p.repetition_penalty, p.presence_penalty, p.frequency_penalty
    launch(
        "sampling.scores",
        (rows, blocks),
        *(logits, scores, maxima, p.temperature, *penalties, p.state_rows, p.state),
        *(logits.stride(0), vocab, blocks),
        BLOCK=block,
    )
    launch(
        "sampling.draw",
        (rows,),
        *(scores, maxima, p.temperature, p.top_k, p.top_p, p.min_p, p.uniform),
        *(p.state_rows, p.state, tokens, vocab, blocks),
        num_warps=16,
        BLOCKS=_power(blocks),
        BLOCK=8192,
    )
    return tokens


def _check_paged(q: Tensor, kv: LayerKV, block_table: Tensor) -> None:
    assert q.is_contiguous() and q.shape[1] % kv.keys.shape[2] == 0, (q.shape, kv.keys.shape)
    assert all(t is None or t.is_contiguous() for t in kv) and q.shape[2] == kv.keys.shape[3]
    assert block_table.dtype == torch.int32 and block_table.stride(1) == 1, block_table.dtype


def _scale(d: int) -> float:
    """Scores in units of log2."""
    return math.log2(math.e) / math.sqrt(d)


def _split_head(d: int) -> tuple[int, int]:
    """A head as a power of two and the rest, padded to one of at least 16; 0: no rest."""
    first = 1 << (d.bit_length() - 1)
    return first, max(16, _power(d - first)) if d > first else 0


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()
