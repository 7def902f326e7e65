"""Norms, SiLU and rotary embedding: a program per row, or per row and block of its columns."""

import triton
import triton.language as tl


@triton.jit
def _add(x, residual, h, row, at, inside, stride_x, stride_r, D: tl.constexpr):
    """x + residual for a row, float32, rounded as h stores it; x alone without a residual."""
    wide = tl.load(x + row * stride_x + at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        wide += tl.load(residual + row * stride_r + at, mask=inside, other=0.0).to(tl.float32)
        rounded = wide.to(h.dtype.element_ty)
        tl.store(h + row * D + at, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    return wide


@triton.jit
def add_rms_norm(
    x, residual, weight, y, h, stride_x, stride_r, eps, D: tl.constexpr, BLOCK: tl.constexpr
):
    """h = x + residual; y = h / sqrt(mean(h^2) + eps) * weight, for the row of the program."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    wide = _add(x, residual, h, row, at, inside, stride_x, stride_r, D)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    y_row = wide * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * D + at, y_row, mask=inside)


@triton.jit
def add_layer_norm(
    x, residual, weight, bias, y, h, stride_x, stride_r, eps, D: tl.constexpr, BLOCK: tl.constexpr
):
    """h = x + residual; y = (h - mean) / sqrt(var + eps) * weight + bias, for the program's row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    wide = _add(x, residual, h, row, at, inside, stride_x, stride_r, D)
    centered = tl.where(inside, wide - tl.sum(wide, 0) / D, 0.0)
    scale = tl.rsqrt(tl.sum(centered * centered, 0) / D + eps)
    y_row = centered * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    y_row += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * D + at, y_row, mask=inside)


@triton.jit
def silu_mul(gate_up, y, stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """y = gate / (1 + exp(-gate)) * up, for a block of columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < D
    gate = tl.load(gate_up + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + D + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * D + at, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)


@triton.jit
def rotary_kv_write(
    qkv, positions, slots, rope, q_out, keys, values, key_scales, value_scales,
    stride, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(a, b) -> (a cos - b sin, b cos + a sin) of the halves of q and k of one token, for a block
    of query heads, or of KV heads, which are written to the token's slot."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    i = tl.arange(0, HALF)
    angle = rope + tl.load(positions + token).to(tl.int64) * D
    cos = tl.load(angle + i, mask=i < D // 2, other=0.0)[None, :]
    sin = tl.load(angle + D // 2 + i, mask=i < D // 2, other=0.0)[None, :]
    q_blocks: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    dtype = qkv.dtype.element_ty
    if block < q_blocks:
        head = block * BLOCK + tl.arange(0, BLOCK)
        inside = (head < HEADS)[:, None] & (i < D // 2)[None, :]
        at = head[:, None] * D + i[None, :]
        a = tl.load(qkv + token * stride + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(qkv + token * stride + at + D // 2, mask=inside, other=0.0).to(tl.float32)
        q_row = q_out + token * (HEADS * D)
        tl.store(q_row + at, (a * cos - b * sin).to(dtype), mask=inside)
        tl.store(q_row + at + D // 2, (b * cos + a * sin).to(dtype), mask=inside)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        head = (block - q_blocks) * BLOCK + tl.arange(0, BLOCK)
        written = head < tl.where(slot >= 0, KV_HEADS, 0)
        inside = written[:, None] & (i < D // 2)[None, :]
        at = head[:, None] * D + i[None, :]
        k_row = qkv + token * stride + HEADS * D
        v_row = k_row + KV_HEADS * D
        a = tl.load(k_row + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(k_row + at + D // 2, mask=inside, other=0.0).to(tl.float32)
        k_a, k_b = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
        v_a = tl.load(v_row + at, mask=inside, other=0.0)
        v_b = tl.load(v_row + at + D // 2, mask=inside, other=0.0)
        if key_scales is not None:
            k_a, k_b, k_scale = _quantize(k_a, k_b)
            v_a, v_b, v_scale = _quantize(v_a, v_b)
            tl.store(key_scales + slot * KV_HEADS + head, k_scale, mask=written)
            tl.store(value_scales + slot * KV_HEADS + head, v_scale, mask=written)
        to = slot * (KV_HEADS * D) + at
        tl.store(keys + to, k_a, mask=inside)
        tl.store(keys + to + D // 2, k_b, mask=inside)
        tl.store(values + to, v_a, mask=inside)
        tl.store(values + to + D // 2, v_b, mask=inside)


@triton.jit
def _quantize(a, b):
    """Both halves of heads `[heads, d / 2]` in int8, and their float16 scales: the largest of a
    head becomes 127."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(a), 1), tl.max(tl.abs(b), 1))
    scale = tl.div_rn(largest, 127.0).to(tl.float16)
    wide = scale.to(tl.float32)[:, None]
    return _to_int8(a, wide), _to_int8(b, wide), scale


@triton.jit
def _to_int8(x, scale):
    # adding and subtracting 1.5 * 2^23 rounds to the nearest integer, halves to even
    q = tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale)) + 12582912.0 - 12582912.0
    q = tl.where(scale == 0.0, 0.0, q)
    return tl.minimum(tl.maximum(q, -127.0), 127.0).to(tl.int8)
