"""Products with int4 and int8 weights (`ops.PackedWeight`), dequantized in registers.

A unit is 16 bytes of one output: four words, whose numbers t are inputs 4 t to 4 t + 3 of 32 (int4)
or 16 (int8). The integers of a weight are exact in bfloat16 and float16, so that only x is rounded;
scales, and zero points of int4, are applied to float32 sums over the inputs that share them.
Integers become floats by setting the exponent: 0x4300 | q is 128 + q in bfloat16, 0x6400 | q is
1024 + q in float16, and 0x4b000000 | q is 2^23 + q in float32 (Kim et al. 2022, arXiv
2211.10017)."""

import triton
import triton.language as tl

from .programmatic import launch_next, wait

PANEL: tl.constexpr = tl.constexpr(16)


@triton.jit
def _integers(words, BITS: tl.constexpr, ROWS: tl.constexpr, dtype: tl.constexpr):
    """Units `[ROWS, 4]` as integers in the order of their inputs, `[ROWS, 128 / BITS]`: with 8 bits
    q, with 4 bits q_uint4 plus 128 in bfloat16 or plus 1024 in float16."""
    if BITS == 8:
        b0, b1 = _byte(words, 0, dtype), _byte(words, 1, dtype)
        b2, b3 = _byte(words, 2, dtype), _byte(words, 3, dtype)
        both = tl.join(tl.join(b0, b1), tl.join(b2, b3))  # [rows, word, t % 2, t / 2]
        integers = tl.permute(both, (0, 3, 2, 1)).reshape(ROWS, 16)
    else:
        p0, p1 = _nibbles(words, 0, dtype), _nibbles(words, 1, dtype)
        p2, p3 = _nibbles(words, 2, dtype), _nibbles(words, 3, dtype)
        all_ = tl.join(tl.join(p0, p1), tl.join(p2, p3))  # [rows, word, t / 4, t % 2, t / 2 % 2]
        integers = tl.permute(all_, (0, 2, 4, 3, 1)).reshape(ROWS, 32)
    return integers


@triton.jit
def _byte(words, t: tl.constexpr, dtype: tl.constexpr):
    wide = (((words >> (8 * t)) & 255) | 0x4B000000).to(tl.float32, bitcast=True)
    return (wide - 8388736.0).to(dtype)  # 2^23 + 128


@triton.jit
def _nibbles(words, t: tl.constexpr, dtype: tl.constexpr):
    """Numbers t and t + 4 of each word."""
    exponent: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
    pairs = ((words >> (4 * t)) & 0x000F000F) | exponent
    first = pairs.to(tl.int16).to(dtype, bitcast=True)
    second = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(first, second)


@triton.jit(do_not_specialize=["rows"])
def packed_vector(
    x, words, scales, sub_scales, bias, out, rows, features, out_features, units, stride,
    exponent_128, exponent_2048, BITS: tl.constexpr, BLOCK_N: tl.constexpr, UNITS: tl.constexpr,
    SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x w^T (+ bias) for one row, BLOCK_N outputs and UNITS units of inputs, as `packed_linear`.

    All loads of the weight are under way before the first number is needed, and before the kernel
    that writes x has ended."""
    launch_next(PDL)
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    unit = split * UNITS + tl.arange(0, UNITS)
    word = tl.arange(0, 4)
    stored = column < (out_features + PANEL - 1) // PANEL * PANEL
    mask = stored[:, None] & (unit < units)[None, :]
    place = column[:, None] * units + unit[None, :]
    at = words + place[:, :, None] * 4 + word[None, None, :]
    packed = tl.load(at, mask=mask[:, :, None], other=0)
    per_group: tl.constexpr = BITS  # units
    at = column[:, None] * (units // per_group) + (unit // per_group)[None, :]
    scale = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    if BITS == 4:
        byte = tl.load(sub_scales + place, mask=mask, other=0).to(tl.int32)
    wait(PDL)
    sums = tl.zeros((BLOCK_N, UNITS, 4), tl.float32)
    even = tl.zeros((UNITS, 4), tl.float32)
    odd = tl.zeros((UNITS, 4), tl.float32)
    for t in tl.static_range(32 // BITS):
        input_ = unit[:, None] * (128 // BITS) + 4 * t + word[None, :]
        inside = input_ < features
        inputs = tl.load(x + row * stride + input_, mask=inside, other=0.0).to(tl.float32)
        if BITS == 8:
            bits = ((packed >> (8 * t)) & 255) | 0x4B000000
            weights = bits.to(tl.float32, bitcast=True) - 8388736.0
        else:
            if t == 0 or t == 7:  # where number t is 128 + q or 2048 + q with an exponent
                moved = (packed << 16) | ((packed >> 16) & 0xFFFF)
            elif t < 3:
                moved = packed << 8
            elif t < 5:
                moved = packed
            else:
                moved = packed >> 8
            if t % 2 == 0:
                weights = ((moved & 0xF0000) | exponent_128).to(tl.float32, bitcast=True)
                even += inputs
            else:
                weights = ((moved & 0xF000) | exponent_2048).to(tl.float32, bitcast=True)
                odd += inputs
        sums += weights * inputs[None, :, :]
    total = tl.sum(sums, 2)
    if BITS == 4:
        evens, odds = tl.sum(even, 1), tl.sum(odd, 1)
        zero_point = (byte >> 4).to(tl.float32)
        total -= (128.0 * evens + 2048.0 * odds)[None, :] + zero_point * (evens + odds)[None, :]
        total *= (byte & 15).to(tl.float32)
    result = tl.sum(total * scale, 1)
    if bias is not None:
        result += tl.load(bias + column, mask=column < out_features, other=0.0).to(tl.float32)
    place = row * out_features + column
    if SPLIT:
        place += split * rows * out_features
    tl.store(out + place, result, mask=column < out_features)


@triton.jit(do_not_specialize=["rows"])
def packed_linear(
    x, words, scales, sub_scales, bias, out, rows, features, out_features, groups, groups_per_split,
    stride, BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x w^T (+ bias) for BLOCK_M rows, BLOCK_N outputs and some groups of inputs: `[rows, out]`;
    with SPLIT the sums of each split, float32 `[splits, rows, out]`, without a bias."""
    launch_next(PDL)
    wait(PDL)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    stored = column < (out_features + PANEL - 1) // PANEL * PANEL
    per_unit: tl.constexpr = 128 // BITS
    fours: tl.constexpr = BITS // 4  # of a group's units; 8, unrolled, take long to compile
    word = tl.arange(0, 4)
    input_ = tl.arange(0, per_unit)
    dtype = x.dtype.element_ty
    zero: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
    x_row = x + row[:, None].to(tl.int64) * stride
    sum_ = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * groups_per_split
    last = tl.minimum(first + groups_per_split, groups)
    for four in range(first * fours, last * fours):
        at = column * groups + four // fours
        scale = tl.load(scales + at, mask=stored, other=0.0).to(tl.float32)
        if BITS == 8:
            part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for unit in tl.static_range(4):
            place = (column * (groups * fours) + four) * 4 + unit
            packed = tl.load(
                words + place[:, None] * 4 + word[None, :], mask=stored[:, None], other=0
            )
            k = (four * 4 + unit) * per_unit + input_
            mask = (row < rows)[:, None] & (k < features)[None, :]
            inputs = tl.load(x_row + k[None, :], mask=mask, other=0.0)
            weights = tl.trans(_integers(packed, BITS, BLOCK_N, dtype))
            if BITS == 8:
                part = tl.dot(inputs, weights, part)
            else:
                byte = tl.load(sub_scales + place, mask=stored, other=0).to(tl.int32)
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


@triton.jit(do_not_specialize=["size"])
def reduce_splits(
    sums, bias, out, splits, size, out_features, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """The sum of splits `[splits, size]` (+ bias), for a block of the `size` results."""
    launch_next(PDL)
    wait(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(sums + split * size + at, mask=at < size, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % out_features, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, total, mask=at < size)


@triton.jit
def dequantize(
    words, scales, sub_scales, out, features, units, all_units, BITS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK of all units of the weight `[out, in]`, of which each output has `units`."""
    launch_next(PDL)
    wait(PDL)
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < all_units
    at = words + unit[:, None] * 4 + tl.arange(0, 4)[None, :]
    packed = tl.load(at, mask=inside[:, None], other=0)
    scale = tl.load(scales + unit // BITS, mask=inside, other=0.0).to(tl.float32)
    integers = _integers(packed, BITS, BLOCK, tl.bfloat16).to(tl.float32)
    if BITS == 4:
        byte = tl.load(sub_scales + unit, mask=inside, other=0).to(tl.int32)
        offset = (byte >> 4).to(tl.float32) + 128.0
        integers = (integers - offset[:, None]) * (byte & 15).to(tl.float32)[:, None]
    per_unit: tl.constexpr = 128 // BITS
    k = (unit % units * per_unit)[:, None] + tl.arange(0, per_unit)[None, :]
    to = out + (unit // units).to(tl.int64)[:, None] * features + k
    tl.store(to, integers * scale[:, None], mask=inside[:, None] & (k < features))
