"""Products with int4 and int8 weights (`ops.PackedWeight`), dequantized in registers.

The integers of a weight are exact in bfloat16 and float16, so that only x is rounded; scales, and
zero points of int4, are applied to the float32 sum over the inputs that share them. Integers become
floats by setting the exponent: 0x4300 | q is 128 + q in bfloat16, 0x6400 | q is 1024 + q in
float16, and 0x4b000000 | q is 2^23 + q in float32 (Kim et al. 2022, arXiv 2211.10017)."""

import triton
import triton.language as tl

PANEL: tl.constexpr = tl.constexpr(16)
GROUP: tl.constexpr = tl.constexpr(128)
SUBGROUP: tl.constexpr = tl.constexpr(32)


@triton.jit
def _integers(
    words, j: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, dtype: tl.constexpr
):
    """Inputs 32 j to 32 j + 31 of a group, `[BLOCK_N, 32]`: with 8 bits q, with 4 bits q_uint4 plus
    128 in bfloat16 or plus 1024 in float16."""
    if BITS == 8:
        wide = (((words >> (8 * j)) & 255) | 0x4B000000).to(tl.float32, bitcast=True)
        integers = (wide - 8388736.0).to(dtype)  # 2^23 + 128
    else:
        exponent: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
        pairs = ((words >> (4 * j)) & 0x000F000F) | exponent
        first = pairs.to(tl.int16).to(dtype, bitcast=True)
        second = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
        integers = tl.join(first, second).reshape(BLOCK_N, SUBGROUP)
    return integers


@triton.jit
def packed_linear(
    x, words, scales, sub_scales, bias, out, rows, features, out_features, groups, groups_per_split,
    stride, BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """x w^T (+ bias) for BLOCK_M rows, BLOCK_N outputs and some groups of inputs: `[rows, out]`;
    with SPLIT the sums of each split, float32 `[splits, rows, out]`, without a bias."""
    panels_padded = (out_features + PANEL - 1) // PANEL * PANEL
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    stored = column < panels_padded
    line = (column // PANEL) * (groups * PANEL) + column % PANEL
    word = tl.arange(0, 4 * BITS)
    input_ = tl.arange(0, SUBGROUP)
    dtype = x.dtype.element_ty
    zero: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
    x_row = x + row[:, None].to(tl.int64) * stride
    sum_ = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * groups_per_split
    for group in range(first, tl.minimum(first + groups_per_split, groups)):
        at = line + group * PANEL
        packed = tl.load(
            words + at[:, None] * (4 * BITS) + word[None, :], mask=stored[:, None], other=0
        )
        scale = tl.load(scales + at, mask=stored, other=0.0).to(tl.float32)
        if BITS == 4:
            sub_scale = tl.load(sub_scales + at, mask=stored, other=0)
        else:
            part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for j in tl.static_range(4):
            k = group * GROUP + j * SUBGROUP + input_
            mask = (row < rows)[:, None] & (k < features)[None, :]
            inputs = tl.load(x_row + k[None, :], mask=mask, other=0.0)
            weights = tl.trans(_integers(packed, j, BITS, BLOCK_N, dtype))
            if BITS == 8:
                part = tl.dot(inputs, weights, part)
            else:
                byte = (sub_scale >> (8 * j)) & 255
                offset = (byte >> 4).to(tl.float32) + zero
                factor = (byte & 15).to(tl.float32) * scale
                total = tl.sum(inputs.to(tl.float32), 1)
                product = tl.dot(inputs, weights) - total[:, None] * offset[None, :]
                sum_ += product * factor[None, :]
        if BITS == 8:
            sum_ += part * scale[None, :]
    inside = (row < rows)[:, None] & (column < out_features)[None, :]
    if bias is not None:
        sum_ += tl.load(bias + column, mask=column < out_features, other=0.0).to(tl.float32)[
            None, :
        ]
    place = row[:, None].to(tl.int64) * out_features + column[None, :]
    if SPLIT:
        place += split.to(tl.int64) * rows * out_features
    tl.store(out + place, sum_, mask=inside)


@triton.jit
def reduce_splits(sums, bias, out, splits, size, out_features, BLOCK: tl.constexpr):
    """The sum of splits `[splits, size]` (+ bias), for a block of the `size` results."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(sums + split * size + at, mask=at < size, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % out_features, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, total, mask=at < size)


@triton.jit
def dequantize(
    words, scales, sub_scales, out, features, out_features, groups, BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of a group of the weight `[out, in]`."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    stored = column < (out_features + PANEL - 1) // PANEL * PANEL
    at = (column // PANEL) * (groups * PANEL) + column % PANEL + group * PANEL
    word = tl.arange(0, 4 * BITS)
    place = words + at[:, None] * (4 * BITS) + word[None, :]
    packed = tl.load(place, mask=stored[:, None], other=0)
    scale = tl.load(scales + at, mask=stored, other=0.0).to(tl.float32)
    for j in tl.static_range(4):
        integers = _integers(packed, j, BITS, BLOCK_N, tl.bfloat16).to(tl.float32)
        if BITS == 4:
            byte = (tl.load(sub_scales + at, mask=stored, other=0) >> (8 * j)) & 255
            offset = (byte >> 4).to(tl.float32) + 128.0
            integers = (integers - offset[:, None]) * (byte & 15).to(tl.float32)[:, None]
        k = group * GROUP + j * SUBGROUP + tl.arange(0, SUBGROUP)
        inside = (column < out_features)[:, None] & (k < features)[None, :]
        to = out + column[:, None].to(tl.int64) * features + k[None, :]
        tl.store(to, integers * scale[:, None], mask=inside)
