"""Norms, SiLU and rotary embedding: a program per row, or per row and block of its columns."""

import triton
import triton.language as tl

from .programmatic import launch_next, wait


@triton.jit
def _finished(x, at, inside, column, bias, split_stride, SPLITS: tl.constexpr):
    """Numbers of a product (`ops.Product`) as float32: its splits added up, and its bias."""
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        wide += tl.load(x + split * split_stride + at, mask=inside, other=0.0)
    if bias is not None:
        wide += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return wide


@triton.jit
def _add(
    x, row_scale, residual, h, row, at, inside, stride_x, stride_r, split_stride,
    SPLITS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """x + residual for a row, float32, rounded as h stores it; x alone without a residual."""
    wide = _finished(x, row * stride_x + at, inside, at, None, split_stride, SPLITS)
    if row_scale is not None:
        wide *= tl.load(row_scale + row)
    if residual is not None:
        wide += tl.load(residual + row * stride_r + at, mask=inside, other=0.0).to(tl.float32)
        rounded = wide.to(h.dtype.element_ty)
        tl.store(h + row * D + at, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    return wide


@triton.jit
def add_rms_norm(
    x, row_scale, residual, weight, y, h, stride_x, stride_r, split_stride, eps,
    SPLITS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h = x + residual; y = h / sqrt(mean(h^2) + eps) * weight, for the row of the program."""
    launch_next(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    wide = _add(
        x, row_scale, residual, h, row, at, inside, stride_x, stride_r, split_stride, SPLITS, D
    )
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    y_row = wide * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * D + at, y_row, mask=inside)


@triton.jit
def add_layer_norm(
    x, row_scale, residual, weight, bias, y, h, stride_x, stride_r, split_stride, eps,
    SPLITS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h = x + residual; y = (h - mean) / sqrt(var + eps) * weight + bias, for the program's row."""
    launch_next(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    wide = _add(
        x, row_scale, residual, h, row, at, inside, stride_x, stride_r, split_stride, SPLITS, D
    )
    centered = tl.where(inside, wide - tl.sum(wide, 0) / D, 0.0)
    scale = tl.rsqrt(tl.sum(centered * centered, 0) / D + eps)
    y_row = centered * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    y_row += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * D + at, y_row, mask=inside)


@triton.jit
def _gated(
    x, row, at, stride, split_stride, GATED: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr
):
    """gate / (1 + exp(-gate)) * up of a row, or x alone, float32."""
    inside = at < D
    value = _finished(x, row * stride + at, inside, at, None, split_stride, SPLITS)
    if GATED:
        up = _finished(x, row * stride + D + at, inside, at, None, split_stride, SPLITS)
        value = value / (1.0 + tl.exp(-value)) * up
    return value


@triton.jit
def silu_mul(
    gate_up, y, stride, split_stride, SPLITS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y = gate / (1 + exp(-gate)) * up, for a block of columns of a row."""
    launch_next(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = _gated(gate_up, row, at, stride, split_stride, True, SPLITS, D)
    tl.store(y + row * D + at, value, mask=at < D)


@triton.jit
def scale_rows(
    x, y, scales, stride, split_stride, GATED: tl.constexpr, SPLITS: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = x / scale, or silu(gate) * up / scale, for a row. Its scale is the smallest power of two
    above the sum of its magnitudes; 2 for a row of zeros."""
    launch_next(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    magnitudes = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        magnitudes += tl.abs(_gated(x, row, start + column, stride, split_stride, GATED, SPLITS, D))
    total = tl.sum(magnitudes, 0)
    bits = total.to(tl.int32, bitcast=True) & 0x7F800000
    scale = 2.0 * tl.where(bits == 0, 1.0, bits.to(tl.float32, bitcast=True))
    scale = tl.where(total == total, scale, float("nan"))
    for start in range(0, D, BLOCK):
        at = start + column
        value = _gated(x, row, at, stride, split_stride, GATED, SPLITS, D)
        tl.store(y + row * D + at, value / scale, mask=at < D)
    tl.store(scales + row, scale)


@triton.jit
def rotary_kv_write(
    qkv, bias, positions, slots, rope, q_out, keys, values, key_scales, value_scales,
    stride, split_stride, SPLITS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """(a, b) -> (a cos - b sin, b cos + a sin) of the halves of q and k of one token, for a block
    of query heads, or of KV heads, which are written to the token's slot."""
    launch_next(PDL)
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    i = tl.arange(0, HALF)
    angle = rope + tl.load(positions + token).to(tl.int64) * D
    cos = tl.load(angle + i, mask=i < D // 2, other=0.0)[None, :]
    sin = tl.load(angle + D // 2 + i, mask=i < D // 2, other=0.0)[None, :]
    q_blocks: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    dtype = q_out.dtype.element_ty
    if block < q_blocks:
        head = block * BLOCK + tl.arange(0, BLOCK)
        inside = (head < HEADS)[:, None] & (i < D // 2)[None, :]
        at = head[:, None] * D + i[None, :]
        a, b = _halves(qkv, token * stride, at, inside, bias, split_stride, SPLITS, D)
        q_row = q_out + token * (HEADS * D)
        tl.store(q_row + at, (a * cos - b * sin).to(dtype), mask=inside)
        tl.store(q_row + at + D // 2, (b * cos + a * sin).to(dtype), mask=inside)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        head = (block - q_blocks) * BLOCK + tl.arange(0, BLOCK)
        written = head < tl.where(slot >= 0, KV_HEADS, 0)
        inside = written[:, None] & (i < D // 2)[None, :]
        at = head[:, None] * D + i[None, :]
        in_k = HEADS * D + at
        a, b = _halves(qkv, token * stride, in_k, inside, bias, split_stride, SPLITS, D)
        k_a, k_b = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
        in_v = in_k + KV_HEADS * D
        v_a, v_b = _halves(qkv, token * stride, in_v, inside, bias, split_stride, SPLITS, D)
        v_a, v_b = v_a.to(dtype), v_b.to(dtype)
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
def _halves(qkv, row, column, inside, bias, split_stride, SPLITS: tl.constexpr, D: tl.constexpr):
    """The two halves of heads whose first halves are at these columns of a row, float32."""
    a = _finished(qkv, row + column, inside, column, bias, split_stride, SPLITS)
    column += D // 2
    return a, _finished(qkv, row + column, inside, column, bias, split_stride, SPLITS)


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
