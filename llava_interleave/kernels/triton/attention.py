"""Attention with online softmax (Dao et al. 2022, arXiv 2205.14135) over a paged KV cache or packed
keys, and its form for one query with the keys split into parts.

A head of `D` numbers is a block of D1 and one of D2 (0: none), powers of two: 72 is 64 + 16, of
which 8 are masked. Scores are in units of log2."""

import triton
import triton.language as tl

from .programmatic import launch_next, wait


@triton.jit
def _floats(x, dtype: tl.constexpr):
    if x.dtype == tl.int8:  # by way of float32: the interpreter has no other
        x = x.to(tl.float32)
    return x.to(dtype)


@triton.jit
def _softmax_tiles(
    q1, q2, k, v, key_scales, value_scales, table, base, visible, first, last,
    scale, stride_k, stride_v, kv_head, KV_HEADS: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Queries `[M, D1]` and `[M, D2]` over keys `first` to `last` of one sequence, up to the key
    `visible` of each query; scale: log2(e) / sqrt(d).

    Key number i is at slot table[i // PAGE] * PAGE + i % PAGE, without a table at base + i. Returns
    the largest score, the sum of exp2(score - largest), and the values weighted by these."""
    largest = tl.full((q1.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((q1.shape[0],), tl.float32)
    sum1 = tl.zeros((q1.shape[0], D1), tl.float32)
    sum2 = tl.zeros((q1.shape[0], D2 if D2 else 16), tl.float32)
    d1 = tl.arange(0, D1)
    d2 = D1 + tl.arange(0, D2 if D2 else 16)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < last
        if table is not None:
            page = tl.load(table + at // PAGE, mask=inside, other=0).to(tl.int64)
            slot = page * PAGE + at % PAGE
        else:
            slot = base + at
        key = k + slot[None, :] * stride_k
        k1 = _floats(tl.load(key + d1[:, None], mask=inside[None, :], other=0.0), dtype)
        score = tl.dot(q1, k1, input_precision="ieee")
        if D2:
            mask = inside[None, :] & (d2 < D)[:, None]
            k2 = _floats(tl.load(key + d2[:, None], mask=mask, other=0.0), dtype)
            score = tl.dot(q2, k2, score, input_precision="ieee")
        score *= scale
        if key_scales is not None:
            place = slot * KV_HEADS + kv_head
            score *= tl.load(key_scales + place, mask=inside, other=0.0).to(tl.float32)[None, :]
        seen = inside[None, :] & (at[None, :] <= visible[:, None])
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(largest, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(largest - higher)
        largest = higher
        total = total * shrink + tl.sum(weight, 1)
        if value_scales is not None:  # 128: in float16 the product would be denormal
            v_scale = tl.load(value_scales + place, mask=inside, other=0.0).to(tl.float32)
            weight *= (v_scale * 128.0)[None, :]
        weight = weight.to(dtype)
        value = v + slot[:, None] * stride_v
        v1 = _floats(tl.load(value + d1[None, :], mask=inside[:, None], other=0.0), dtype)
        sum1 = tl.dot(weight, v1, sum1 * shrink[:, None], input_precision="ieee")
        if D2:
            mask = inside[:, None] & (d2 < D)[None, :]
            v2 = _floats(tl.load(value + d2[None, :], mask=mask, other=0.0), dtype)
            sum2 = tl.dot(weight, v2, sum2 * shrink[:, None], input_precision="ieee")
    if value_scales is not None:
        sum1, sum2 = sum1 / 128.0, sum2 / 128.0
    return largest, total, sum1, sum2


@triton.jit
def attention(
    q, k, v, key_scales, value_scales, table, cu_q, cu_k, out,
    scale, stride_q, stride_k, stride_v, stride_table,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """softmax(q k^T / sqrt(d)) v for BLOCK_M queries of a head of a sequence.

    cu_k: cumulative numbers of keys `[N + 1]`; with a table the number of each sequence `[N]`."""
    launch_next(PDL)
    wait(PDL)
    block = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    begin = tl.load(cu_q + sequence).to(tl.int64)
    queries = (tl.load(cu_q + sequence + 1) - begin).to(tl.int32)
    if block * BLOCK_M >= queries:
        return
    if table is not None:
        table += sequence.to(tl.int64) * stride_table
        base = 0
        keys = tl.load(cu_k + sequence)
    else:
        base = tl.load(cu_k + sequence).to(tl.int64)
        keys = (tl.load(cu_k + sequence + 1) - base).to(tl.int32)
    kv_head = head // (HEADS // KV_HEADS)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d1 = tl.arange(0, D1)[None, :]
    d2 = D1 + tl.arange(0, D2 if D2 else 16)[None, :]
    inside = (row < queries)[:, None]
    query = q + (begin + row)[:, None] * stride_q + head * D
    dtype = q.dtype.element_ty
    q1 = tl.load(query + d1, mask=inside, other=0.0)
    q2 = q1
    if D2:
        q2 = tl.load(query + d2, mask=inside & (d2 < D), other=0.0)
    if CAUSAL:
        visible = keys - queries + row
        last = tl.minimum(keys, keys - queries + (block + 1) * BLOCK_M)
    else:
        visible = tl.zeros((BLOCK_M,), tl.int32) + keys
        last = keys
    _, total, sum1, sum2 = _softmax_tiles(
        q1, q2, k + kv_head * D, v + kv_head * D, key_scales, value_scales, table,
        base, visible, 0, last, scale, stride_k, stride_v, kv_head, KV_HEADS, PAGE, D, D1, D2,
        BLOCK_N, dtype,
    )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)[:, None]
    to = out + ((begin + row)[:, None] * HEADS + head) * D
    tl.store(to + d1, sum1 / total, mask=inside)
    if D2:
        tl.store(to + d2, sum2 / total, mask=inside & (d2 < D))


@triton.jit
def decode_parts(
    q, k, v, key_scales, value_scales, table, seqlens, sums, logs,
    scale, stride_k, stride_v, stride_table, max_parts,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, PART: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of the GROUP queries of a KV head over some of its parts of PART keys: for each the
    result `[N, H, max_parts, d]` and log2 of its sum of exponentials `[N, H, max_parts]`."""
    launch_next(PDL)
    wait(PDL)
    sequence = tl.program_id(1).to(tl.int64)
    kv_head = tl.program_id(2)
    length = tl.load(seqlens + sequence)
    table += sequence * stride_table
    member = tl.arange(0, BLOCK_M)
    head = sequence * (GROUP * KV_HEADS) + kv_head * GROUP + member
    inside = (member < GROUP)[:, None]
    d1 = tl.arange(0, D1)[None, :]
    d2 = D1 + tl.arange(0, D2 if D2 else 16)[None, :]
    dtype = q.dtype.element_ty
    q1 = tl.load(q + head[:, None] * D + d1, mask=inside, other=0.0)
    q2 = q1
    if D2:
        q2 = tl.load(q + head[:, None] * D + d2, mask=inside & (d2 < D), other=0.0)
    visible = tl.zeros((BLOCK_M,), tl.int32) + length
    for part in range(tl.program_id(0), tl.cdiv(length, PART), tl.num_programs(0)):
        largest, total, sum1, sum2 = _softmax_tiles(
            q1, q2, k + kv_head * D, v + kv_head * D, key_scales, value_scales,
            table, 0, visible, part * PART, tl.minimum(length, part * PART + PART), scale,
            stride_k, stride_v, kv_head, KV_HEADS, PAGE, D, D1, D2, BLOCK_N, dtype,
        )  # fmt: skip
        to = head * max_parts + part
        tl.store(logs + to, largest + tl.log2(total), mask=member < GROUP)
        tl.store(sums + to[:, None] * D + d1, sum1 / total[:, None], mask=inside)
        if D2:
            tl.store(sums + to[:, None] * D + d2, sum2 / total[:, None], mask=inside & (d2 < D))


@triton.jit
def decode_reduce(
    sums, logs, seqlens, out, max_parts, HEADS: tl.constexpr, D: tl.constexpr,
    PADDED: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The parts of one head weighted by their sums of exponentials; 0 for an empty sequence."""
    launch_next(PDL)
    wait(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    head = sequence * HEADS + tl.program_id(1)
    parts = tl.cdiv(tl.load(seqlens + sequence), PART)
    d = tl.arange(0, PADDED)
    largest = float("-inf")
    total = 0.0
    result = tl.zeros((PADDED,), tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        inside = part < parts
        log = tl.load(logs + head * max_parts + part, mask=inside, other=float("-inf"))
        higher = tl.maximum(largest, tl.max(log, 0))
        weight = tl.exp2(log - higher)
        shrink = tl.exp2(largest - higher)
        place = (head * max_parts + part)[:, None] * D + d[None, :]
        rows = tl.load(sums + place, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        result = result * shrink + tl.sum(weight[:, None] * rows, 0)
        total = total * shrink + tl.sum(weight, 0)
        largest = higher
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(out + head * D + d, result / total, mask=d < D)
