"""Typed entry points of the Triton kernels: they check shapes and types, and launch.

T tokens of N sequences, H heads in Hkv groups of `head_dim` d; x is float16, bfloat16, or float32.
Everything is computed in float32 and rounded once, to the type of x. The residual stream of a
float16 network is float32."""

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
UNITS_PER_PROGRAM = 32
"""Units of 16 bytes of an output that one program of a product of few rows reads: fixed, so that
the rounding of an answer does not depend on the GPU."""
FLOAT_EXPONENTS = 0x43000000, 0x45000000
"""Bits of 128 and 2048 in float32. Arguments of the kernel: a logical instruction has room for one
constant, which is the mask."""
VECTOR_ROWS = 2
"""Rows up to which a quantized product is computed row by row, without tensor cores."""
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


class Product(NamedTuple):
    """What a product leaves to the kernel that reads it: scale * (the sum of sums + bias).

    sums: float32 `[splits, T, out]`, or x w^T itself `[T, out]`. bias: `[out]`. scale: float32
    `[T]`, of `scale_rows`. dtype: of x."""

    sums: Tensor
    bias: Tensor | None
    scale: Tensor | None
    dtype: torch.dtype

    @property
    def splits(self) -> int:
        return len(self.sums) if self.sums.dim() == 3 else 1


class PackedWeight(NamedTuple):
    """An int4 or int8 weight `[out, in]` of `quantization.packing`, in the order in which the
    kernels read it; outputs are filled up to a multiple of 16, inputs to groups of 128.

    words: int32 `[outputs, groups, 4 or 8 units, 4]`. Number t of word i of a unit, 4 or 8 bits
    from the lowest, is q_uint4 or q + 128 of the unit's input 4 t + i; it has 32 or 16 inputs.
    scales: float16 `[outputs, groups]`. sub_scales: with 4 bits, uint8 `[outputs, groups, 4]`,
    sub_scale + 16 * zero_point of a unit."""

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
    x: Tensor | Product, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h = x + residual; y = h / sqrt(mean(h^2) + eps) * weight. Returns y and h, `[T, D]`.

    Without a residual h is x. One launch."""
    if not runs_kernel(_sums(x)):
        return reference.add_rms_norm(x, weight, eps, residual)
    return _norm("elementwise.add_rms_norm", x, residual, (weight,), eps)


def add_layer_norm(
    x: Tensor | Product, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h = x + residual; y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias. Returns y and h,
    `[T, D]`. One launch."""
    if not runs_kernel(_sums(x)):
        return reference.add_layer_norm(x, weight, bias, eps, residual)
    return _norm("elementwise.add_layer_norm", x, residual, (weight, bias), eps)


def _norm(
    name: str,
    x: Tensor | Product,
    residual: Tensor | None,
    parameters: tuple[Tensor, ...],
    eps: float,
) -> tuple[Tensor, Tensor]:
    x, sums = _product(x), _sums(x)
    rows, width = sums.shape[-2:]
    assert sums.stride(-1) == 1 and all(p.shape == (width,) for p in parameters), sums.shape
    assert residual is None or (residual.shape == (rows, width) and residual.stride(1) == 1)
    assert x.bias is None, "no norm follows a linear with a bias"
    dtype = parameters[0].dtype
    y = sums.new_empty(rows, width, dtype=dtype)
    h = sums
    if residual is not None:
        h = torch.empty_like(y, dtype=reference.residual_dtype(dtype))
    block = _power(width)
    strides = sums.stride(-2), 0 if residual is None else residual.stride(0), _split_stride(x)
    launch(
        name,
        (rows,),
        *(sums, x.scale, residual, *parameters, y, h, *strides, eps),
        num_warps=min(max(block // 512, 1), 16),
        SPLITS=x.splits,
        D=width,
        BLOCK=block,
    )
    return y, h


def _product(x: Tensor | Product) -> Product:
    return Product(x, None, None, x.dtype) if isinstance(x, Tensor) else x


def _sums(x: Tensor | Product) -> Tensor:
    return x if isinstance(x, Tensor) else x.sums


def _split_stride(x: Product) -> int:
    return x.sums.stride(0) if x.splits > 1 else 0


def silu_mul(gate_up: Tensor | Product) -> Tensor:
    """silu(gate) * up of `[T, 2 I]`, gate first, without a bias -> `[T, I]`. One launch."""
    if not runs_kernel(_sums(gate_up)):
        return reference.silu_mul(gate_up)
    x = _product(gate_up)
    assert x.bias is x.scale is None and x.sums.stride(-1) == 1, x.sums.stride()
    rows, width = x.sums.shape[-2], x.sums.shape[-1] // 2
    y = x.sums.new_empty(rows, width, dtype=x.dtype)
    block = min(_power(width), 1024)
    launch(
        "elementwise.silu_mul",
        (rows, -(-width // block)),
        *(x.sums, y, x.sums.stride(-2), _split_stride(x)),
        SPLITS=x.splits,
        D=width,
        BLOCK=block,
    )
    return y


def scale_rows(x: Tensor | Product, *, gated: bool = False) -> tuple[Tensor, Tensor]:
    """Rows `[T, D]` divided by powers of two, and these, float32 `[T]`: the magnitudes of a row sum
    to less than 1 then, so that no product of it exceeds the largest weight, as float16 needs.
    gated: rows are those of `silu_mul`. One launch."""
    if not runs_kernel(_sums(x)):
        return reference.scale_rows(x, gated=gated)
    product = _product(x)
    sums = product.sums
    assert product.bias is product.scale is None and sums.stride(-1) == 1, sums.stride()
    rows, width = sums.shape[-2], sums.shape[-1] // (1 + gated)
    y = sums.new_empty(rows, width, dtype=product.dtype)
    scales = sums.new_empty(rows, dtype=torch.float32)
    launch(
        "elementwise.scale_rows",
        (rows,),
        *(sums, y, scales, sums.stride(-2), _split_stride(product)),
        num_warps=8,
        GATED=gated,
        SPLITS=product.splits,
        D=width,
        BLOCK=min(_power(width), 2048),
    )
    return y, scales


def rotary_kv_write(
    qkv: Tensor | Product,
    positions: Tensor,
    slots: Tensor,
    rope: Tensor,
    kv: LayerKV,
    num_heads: int,
) -> Tensor:
    """Rotates q and k, writes k and v to the cache, returns q `[T, H, d]`.

    qkv: `[T, (H + 2 Hkv) d]`, the output of the merged projection. positions: int32 `[T]`. slots:
    int32 `[T]`, block * block_size + place in it; negative: not written. rope: of `rope_table`.
    An int8 cache is written as `engine.kv_contiguous.quantize_kv` rounds. One launch."""
    if not runs_kernel(_sums(qkv)):
        return reference.rotary_kv_write(qkv, positions, slots, rope, kv, num_heads)
    x = _product(qkv)
    tokens, (kv_heads, d) = x.sums.shape[-2], kv.keys.shape[2:]
    assert x.sums.shape[-1] == (num_heads + 2 * kv_heads) * d, x.sums.shape
    assert x.scale is None and x.sums.stride(-1) == 1, x.sums.stride()
    assert rope.shape[1] == d and all(t is None or t.is_contiguous() for t in kv), rope.shape
    q = x.sums.new_empty(tokens, num_heads, d, dtype=x.dtype)
    block = min(_power(num_heads), 8)
    launch(
        "elementwise.rotary_kv_write",
        (tokens, -(-num_heads // block) + -(-kv_heads // block)),
        *(x.sums, x.bias, positions, slots, rope, q),
        *(kv.keys, kv.values, kv.key_scales, kv.value_scales),
        *(x.sums.stride(-2), _split_stride(x)),
        SPLITS=x.splits,
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

    One launch, or two where the inputs are split over programs. Beyond `MAX_FUSED_ROWS` the weight
    is dequantized by one launch, and cuBLAS multiplies."""
    if not runs_kernel(x):
        return reference.packed_linear(x, w, bias)
    product = packed_product(x, w, bias)
    sums = product.sums
    if sums.dim() == 2:
        return sums
    y = x.new_empty(sums.shape[1:])
    arguments = (sums, bias, y, product.splits, y.numel(), w.out_features)
    launch("linear.reduce_splits", (-(-y.numel() // 512),), *arguments, BLOCK=512)
    return y


def packed_product(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Product:
    """`packed_linear` whose splits the next kernel adds up. One launch."""
    if not runs_kernel(x):
        return Product(reference.packed_linear(x, w, bias), None, None, x.dtype)
    rows, groups, out = len(x), w.words.shape[1], w.out_features
    assert x.dtype in (torch.float16, torch.bfloat16), x.dtype
    assert x.shape[1] == w.in_features and x.stride(1) == 1, (x.shape, w.in_features)
    if rows > MAX_FUSED_ROWS:
        y = torch.nn.functional.linear(x, dequantize(w, x.dtype), bias)
        return Product(y, None, None, x.dtype)
    few, bits = rows <= VECTOR_ROWS, 8 if w.sub_scales is None else 4
    block_m = min(max(16, _power(rows)), 64)
    block_n = 2 * bits if few else 32 if block_m == 64 or out < 64 * multiprocessors(x) else 64
    if few:
        per_split = UNITS_PER_PROGRAM // bits
    else:  # of 4 groups at least; independent of the rows, since splits change the rounding
        splits = max(1, min(2 * multiprocessors(x) // -(-out // block_n), groups // 4))
        per_split = -(-groups // splits)
    splits = -(-groups // per_split)
    own_bias = bias if splits == 1 else None
    shape, dtype = ((rows, out), x.dtype) if splits == 1 else ((splits, rows, out), torch.float32)
    sums = x.new_empty(shape, dtype=dtype)
    tensors, blocks = (x, w.words, w.scales, w.sub_scales, own_bias, sums), -(-out // block_n)
    if few:
        launch(
            "linear.packed_vector",
            (rows, blocks, splits),
            *(*tensors, rows, w.in_features, out, groups * bits, x.stride(0)),
            *FLOAT_EXPONENTS,
            num_warps=1,
            BITS=bits,
            BLOCK_N=block_n,
            UNITS=UNITS_PER_PROGRAM,
            SPLIT=splits > 1,
        )
    else:
        launch(
            "linear.packed_linear",
            (blocks, -(-rows // block_m), splits),
            *(*tensors, rows, w.in_features, out, groups, per_split, x.stride(0)),
            num_warps=4 if block_m < 64 else 8,
            num_stages=4 if block_m < 64 else 2,
            BITS=bits,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            SPLIT=splits > 1,
        )
    return Product(sums, None if splits == 1 else bias, None, x.dtype)


def dequantize(w: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight `[out, in]`. One launch."""
    if not runs_kernel(w.scales):
        return reference.dequantize(w, dtype)
    y = torch.empty(w.out_features, w.in_features, dtype=dtype, device=w.words.device)
    bits = 8 if w.sub_scales is None else 4
    units = w.words.shape[1] * bits
    total = w.out_features * units
    launch(
        "linear.dequantize",
        (-(-total // 128),),
        *(w.words, w.scales, w.sub_scales, y, w.in_features, units, total),
        BITS=bits,
        BLOCK=128,
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
