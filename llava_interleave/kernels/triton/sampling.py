"""Sampling of a batch as `engine.sampler.Sampler` defines it, in two kernels: scores of all blocks
of all rows, then a program per row.

Scores are compared as integers of the same order, so that a threshold is found exactly: bits of a
float32, of which those below the sign are inverted where it is set."""

import triton
import triton.language as tl

from .programmatic import launch_next, wait

PROMPT_TOKEN: tl.constexpr = tl.constexpr(1 << 30)
LOWEST: tl.constexpr = tl.constexpr(-(2**31))


@triton.jit
def scores(
    logits, out, maxima, temperature, repetition, presence, frequency, state_rows, state,
    stride, vocab, blocks, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Logits after penalties and temperature, float32 `[N, vocab]`, and the largest of each block
    `[N, blocks]`."""
    launch_next(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    score = tl.load(logits + row * stride + at, mask=inside, other=float("-inf")).to(tl.float32)
    if state is not None:
        state_row = tl.load(state_rows + row).to(tl.int64)
        if state_row >= 0:
            seen = tl.load(state + state_row * vocab + at, mask=inside, other=0)
            count = seen & (PROMPT_TOKEN - 1)
            penalty = tl.load(repetition + row)
            penalized = tl.where(score < 0, score * penalty, tl.div_rn(score, penalty))
            score = tl.where(seen != 0, penalized, score)
            lower = tl.load(presence + row) + tl.load(frequency + row) * count.to(tl.float32)
            score = tl.where(count > 0, score - lower, score)
    heat = tl.load(temperature + row)
    score = tl.div_rn(score, tl.where(heat == 0.0, 1.0, heat))
    tl.store(out + row * vocab + at, score, mask=inside)
    tl.store(maxima + row * blocks + block, tl.max(score, 0))


@triton.jit
def draw(
    all_scores, maxima, temperature, top_k, top_p, min_p, uniform, state_rows, state, tokens,
    vocab, blocks, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The token of a row; adds it to the row's state."""
    launch_next(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    values = all_scores + row * vocab
    block = tl.arange(0, BLOCKS)
    largest = tl.load(maxima + row * blocks + block, mask=block < blocks, other=float("-inf"))
    top = tl.max(largest, 0)
    if tl.load(temperature + row) == 0.0:
        token = _first_at_least(values, top, vocab, BLOCK)
    else:
        lower = tl.full((), LOWEST, tl.int64)
        k = tl.load(top_k + row)
        if (k > 0) & (k < vocab):
            lower = _threshold(values, lower, top, k.to(tl.float32), vocab, False, BLOCK)
        p = tl.load(top_p + row)
        if p < 1.0:
            target = p * _mass(values, lower, top, vocab, BLOCK).to(tl.float32)
            lower = _threshold(values, lower, top, target, vocab, True, BLOCK)
        minimum = tl.load(min_p + row)
        if minimum > 0.0:
            lower = tl.maximum(lower, _key(top + tl.log(minimum)).to(tl.int64))
        total = _mass(values, lower, top, vocab, BLOCK)
        token = _inverse(values, lower, top, tl.load(uniform + row) * total, vocab, BLOCK)
    tl.store(tokens + row, token.to(tl.int64))
    if state is not None:
        state_row = tl.load(state_rows + row).to(tl.int64)
        if state_row >= 0:
            place = state + state_row * vocab + token
            tl.store(place, tl.load(place) + 1)


@triton.jit
def _key(score):
    """Integers in the order of the scores."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _weights(values, start, lower, top, vocab, BLOCK: tl.constexpr):
    """exp(score - top) of a block of the scores; 0 where the key is below `lower`."""
    at = start + tl.arange(0, BLOCK)
    score = tl.load(values + at, mask=at < vocab, other=float("-inf"))
    kept = (at < vocab) & (_key(score).to(tl.int64) >= lower)
    return tl.where(kept, tl.exp(score - top), 0.0)


@triton.jit
def _first_at_least(values, minimum, vocab, BLOCK: tl.constexpr):
    """The first token whose score is at least `minimum`."""
    first = tl.full((BLOCK,), 2**31 - 1, tl.int32)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        score = tl.load(values + at, mask=at < vocab, other=float("-inf"))
        found = (score >= minimum) & (at < vocab)
        first = tl.minimum(first, tl.where(found, at, 2**31 - 1))
    return tl.minimum(tl.min(first, 0), vocab - 1)


@triton.jit
def _mass(values, lower, top, vocab, BLOCK: tl.constexpr):
    """The sum of exp(score - top) of keys from `lower` on, float64."""
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, vocab, BLOCK):
        total += tl.sum(_weights(values, start, lower, top, vocab, BLOCK), 0).to(tl.float64)
    return total


@triton.jit
def _threshold(values, lower, top, target, vocab, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key from `lower` on such that the tokens of at least it reach `target`: their
    number, or WEIGHTED their sum of exp(score - top).

    Bisection between keys that occur, so that it ends after about log2 of their number."""
    high = _key(top).to(tl.int64) + 1
    while lower + 1 < high:
        middle = lower + (high - lower) // 2
        reached = tl.zeros((BLOCK,), tl.float32)
        above = tl.full((BLOCK,), 2**31 - 1, tl.int32)
        below = tl.full((BLOCK,), LOWEST, tl.int32)
        for start in range(0, vocab, BLOCK):
            at = start + tl.arange(0, BLOCK)
            score = tl.load(values + at, mask=at < vocab, other=float("-inf"))
            key = _key(score)
            kept = (at < vocab) & (key.to(tl.int64) >= middle)
            if WEIGHTED:
                reached += tl.where(kept, tl.exp(score - top), 0.0)
            else:
                reached += kept.to(tl.float32)
            above = tl.minimum(above, tl.where(kept, key, 2**31 - 1))
            below = tl.maximum(below, tl.where((at < vocab) & (kept == 0), key, LOWEST))
        if tl.sum(reached, 0) >= target:
            lower = tl.min(above, 0).to(tl.int64)
        else:
            high = tl.maximum(lower, tl.max(below, 0).to(tl.int64)) + 1
    return lower


@triton.jit
def _inverse(values, lower, top, target, vocab, BLOCK: tl.constexpr):
    """The first token at which the cumulative sum of exp(score - top) is above `target`; the last
    one with a weight where rounding leaves none."""
    before = tl.full((), 0.0, tl.float64)
    token = tl.full((), -1, tl.int32)
    last = tl.full((), 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        weight = _weights(values, start, lower, top, vocab, BLOCK)
        at = start + tl.arange(0, BLOCK)
        after = before + tl.sum(weight, 0).to(tl.float64)
        last_here = tl.max(tl.where(weight > 0.0, at, -1), 0)
        if (token < 0) & (after > target):
            found = (before + tl.cumsum(weight, 0).to(tl.float64) > target) & (weight > 0.0)
            token = tl.minimum(tl.min(tl.where(found, at, 2**31 - 1), 0), last_here)
        last = tl.maximum(last, last_here)
        before = after
    return tl.where(token < 0, last, token)
