"""Whether a device computes what the kernels should: each against its formula in float64.

The cases of the probe are also those of the tests, which take more sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from . import ops
from .ops import LayerKV, PackedWeight, Product, SamplingTensors
from .reference import PROMPT_TOKEN

MAX_ERROR = 0.02
"""Largest norm of an error, relative to that of the result: a few times bfloat16's rounding."""
Case = Callable[[Callable[[Any], Any]], Any]
"""A call of a kernel, whose tensors go through a function first; returns what it computes and the
arguments that it may have changed."""


@cache
def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a network on `device` that computes in `dtype` cannot use the kernels, or None.

    The first call runs each kernel (`probe`); compiling them takes seconds, unless Triton has them
    in its cache.
    """
    if device.type != "cuda" or torch.version.hip:
        return "they need a CUDA GPU of NVIDIA"
    if dtype not in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        return f"they compute in float16 or bfloat16, and this network in {name}: use bfloat16"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {major}.{minor}, and 8.0 is needed"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    reasons = probe(device, dtype)
    if len({*reasons.values()}) == 1:  # such as a machine without a C compiler
        return next(iter(reasons.values()))
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)


def probe(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """By case, why its results cannot be used; None where they are right."""
    reasons: dict[str, str | None] = {}
    for name, case in cases(device, dtype).items():
        try:
            off = error(case)
            reasons[name] = None if off <= MAX_ERROR else f"the results are off by {off:.2g}"
        except Exception as failure:  # noqa: BLE001  # whatever Triton or the driver raise
            reasons[name] = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
    return reasons


@torch.inference_mode()
def error(case: Case) -> float:
    """The largest norm of a difference between a kernel's results and those of its formula in
    float64, relative to the latter; NaN if a result is NaN."""
    got, right = case(tree_clone), case(partial(tree_clone, dtype=torch.float64))
    errors = []
    for a, b in zip(tree_leaves(got), tree_leaves(right), strict=True):
        if a is None:
            continue
        difference = (a.double() - b.double()).masked_fill(a.isnan() & b.isnan(), 0)
        errors.append(float(difference.norm() / b.double().nan_to_num().norm().clamp_min(1e-9)))
    return max(errors, key=lambda e: (e != e, e))


def tree_clone(tree: Any, dtype: torch.dtype | None = None) -> Any:
    """Copies of tensors, floats in `dtype`, which also takes the place of types."""

    def copy(x: Any) -> Any:
        if dtype is not None and isinstance(x, torch.dtype):
            return dtype
        if not isinstance(x, Tensor):
            return x
        return x.clone() if dtype is None or not x.is_floating_point() else x.to(dtype)

    copies = tree_map(copy, tree)
    if torch.cuda.is_available():  # weights must not be younger than the kernel before
        torch.cuda.synchronize()
    return copies


def cases(device: torch.device, dtype: torch.dtype) -> dict[str, Case]:
    """Every kernel in a small size, by name."""
    r = Random(device, dtype)
    found: dict[str, Case] = {
        "add_rms_norm": r.norm(3, 136, layer_norm=False),
        "add_layer_norm": r.norm(3, 136, layer_norm=True),
        "silu_mul": r.silu_mul(3, 300),
        "scale_rows": r.scale_rows(3, 300, gated=False),
        "scale_rows, silu_mul": r.scale_rows(3, 300, gated=True),
        "add_rms_norm of a product": r.norm(3, 136, layer_norm=False, splits=3),
        "rotary_kv_write of a product": r.rotary(5, 4, 2, 64, int8=False, splits=2),
        "silu_mul of a product": r.silu_mul(3, 300, splits=2),
        "varlen_attention": r.varlen([3, 70], 4, 2, 72, causal=False),
        "sample": r.sample(3000),
    }
    for int8 in (False, True):
        kind = "int8" if int8 else "16 bit"
        found[f"rotary_kv_write, {kind}"] = r.rotary(5, 4, 2, 64, int8=int8)
        found[f"paged_decode, {kind}"] = r.decode([1, 0, 300], 4, 2, 64, int8=int8)
        found[f"paged_attention, {kind}"] = r.prefill([5, 66], [70, 66], 4, 2, 64, int8=int8)
    for bits in (4, 8):
        found[f"packed_linear, int{bits}"] = r.linear(3, 200, 40, bits)
        found[f"packed_linear, int{bits}, 1 row"] = r.linear(1, 1200, 40, bits)
        found[f"dequantize, int{bits}"] = r.dequantize(200, 40, bits)
    return found


class Random:
    """Makes cases of random numbers, the same for every device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def product(self, rows: int, width: int, splits: int, bias: bool, scale: bool) -> Any:
        """What a product leaves to the next kernel; rows themselves without splits."""
        if not splits:
            return self.floats(rows, width)
        sums = self.floats(splits, rows, width, dtype=torch.float32)
        own = self.floats(width) if bias else None
        powers = 2.0 ** self.ints([row % 5 - 2 for row in range(rows)]).float() if scale else None
        return Product(sums, own, powers, self.dtype)

    def norm(self, rows: int, width: int, *, layer_norm: bool, splits: int = 0) -> Case:
        x = self.product(rows, width, splits, bias=False, scale=True)
        residual = self.floats(rows, width)
        weight, bias = self.floats(width), self.floats(width)

        def case(to: Callable[[Any], Any]) -> Any:
            if layer_norm:
                return ops.add_layer_norm(to(x), to(weight), to(bias), 1e-6, to(residual))
            return ops.add_rms_norm(to(x), to(weight), 1e-6, to(residual))

        return case

    def silu_mul(self, rows: int, width: int, splits: int = 0) -> Case:
        gate_up = self.product(rows, 2 * width, splits, bias=False, scale=False)
        return lambda to: ops.silu_mul(to(gate_up))

    def scale_rows(self, rows: int, width: int, *, gated: bool, splits: int = 0) -> Case:
        """The last row is 0, and silu(gate) * up of the first more than float16 has."""
        x = self.product(rows, width * (1 + gated), splits, bias=False, scale=False)
        sums = x if isinstance(x, Tensor) else x.sums
        sums[..., -1, :] = 0
        sums[..., 0, :] *= 1000
        return lambda to: ops.scale_rows(to(x), gated=gated)

    def rotary(
        self, tokens: int, heads: int, kv_heads: int, d: int, *, int8: bool, splits: int = 0
    ) -> Case:
        """The last token but one is not written."""
        width = (heads + 2 * kv_heads) * d
        qkv = self.product(tokens, width, splits, bias=True, scale=False)
        positions = self.ints([7 * token for token in range(tokens)])
        slots = self.ints([-1 if token == tokens - 2 else token + 20 for token in range(tokens)])
        kv = self.cache(-(-(tokens + 20) // 16), 16, kv_heads, d, int8=int8)
        rope = ops.rope_table(7 * tokens, d, 1e4, self.device)

        def case(to: Callable[[Any], Any]) -> Any:
            cache = to(kv)
            return ops.rotary_kv_write(to(qkv), positions, slots, to(rope), cache, heads), cache

        return case

    def cache(self, blocks: int, size: int, kv_heads: int, d: int, *, int8: bool) -> LayerKV:
        """Empty pages: of NaN, or in int8 with scales of NaN."""
        shape = blocks, size, kv_heads, d
        if not int8:
            empty = torch.full(shape, torch.nan, dtype=self.dtype, device=self.device)
            return LayerKV(empty, empty.clone())
        full = torch.full(shape, 127, dtype=torch.int8, device=self.device)
        scales = torch.full(shape[:3], torch.nan, dtype=torch.float16, device=self.device)
        return LayerKV(full, full.clone(), scales, scales.clone())

    def paged(
        self, lengths: Sequence[int], kv_heads: int, d: int, *, int8: bool, size: int = 16
    ) -> tuple[LayerKV, Tensor]:
        """A cache with the tokens of sequences, and its block table, whose other entries are a page
        of NaN."""
        counts = [-(-length // size) for length in lengths]
        kv = self.cache(sum(counts) + 1, size, kv_heads, d, int8=int8)
        order = torch.randperm(sum(counts), generator=self.generator).tolist()
        table = torch.full((len(lengths), max(counts)), sum(counts), dtype=torch.int32)
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            blocks, order = order[:count], order[count:]
            table[row, :count] = torch.tensor(blocks, dtype=torch.int32)
            for token in range(length):
                at = blocks[token // size], token % size
                for pool, scales in ((kv.keys, kv.key_scales), (kv.values, kv.value_scales)):
                    new = self.floats(kv_heads, d)
                    if scales is not None:
                        new = (40 * new).clamp(-127, 127)
                        scales[at] = self.floats(kv_heads).abs() / 40
                    pool[at] = new.to(pool.dtype)
        return kv, table.to(self.device)

    def decode(
        self, lengths: Sequence[int], heads: int, kv_heads: int, d: int, *, int8: bool = False
    ) -> Case:
        q = self.floats(len(lengths), heads, d)
        kv, table = self.paged(lengths, kv_heads, d, int8=int8)
        return lambda to: ops.paged_decode(to(q), to(kv), table, self.ints(lengths))

    def prefill(
        self,
        queries: Sequence[int],
        lengths: Sequence[int],
        heads: int,
        kv_heads: int,
        d: int,
        *,
        int8: bool = False,
    ) -> Case:
        q = self.floats(sum(queries), heads, d)
        kv, table = self.paged(lengths, kv_heads, d, int8=int8)
        starts = self.ints([sum(queries[:n]) for n in range(len(queries) + 1)])
        return lambda to: ops.paged_attention(
            to(q), to(kv), table, starts, self.ints(lengths), max(queries)
        )

    def varlen(
        self, lengths: Sequence[int], heads: int, kv_heads: int, d: int, *, causal: bool
    ) -> Case:
        """q, k and v are views of one product."""
        qkv = self.floats(sum(lengths), heads + 2 * kv_heads, d)
        starts = self.ints([sum(lengths[:n]) for n in range(len(lengths) + 1)])

        def case(to: Callable[[Any], Any]) -> Any:
            q, k, v = to(qkv).split([heads, kv_heads, kv_heads], 1)
            return ops.varlen_attention(q, k, v, starts, starts, max(lengths), causal=causal)

        return case

    def weight(self, inputs: int, outputs: int, bits: int) -> PackedWeight:
        rows, groups = -(-outputs // 16) * 16, -(-inputs // 128)

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=self.generator)

        words = integers(-(2**31), 2**31, rows, groups, bits, 4).int().to(self.device)
        scales = self.floats(rows, groups, dtype=torch.float16) / 64
        sub_scales = None
        if bits == 4:
            sub_scales = integers(0, 256, rows, groups, 4).to(torch.uint8).to(self.device)
        return PackedWeight(words, scales, sub_scales, outputs, inputs)

    def linear(self, rows: int, inputs: int, outputs: int, bits: int) -> Case:
        x, bias = self.floats(rows, inputs), self.floats(outputs)
        weight = self.weight(inputs, outputs, bits)
        return lambda to: ops.packed_linear(to(x), to(weight), to(bias))

    def dequantize(self, inputs: int, outputs: int, bits: int) -> Case:
        weight = self.weight(inputs, outputs, bits)
        return lambda to: ops.dequantize(to(weight), to(torch.empty(0, dtype=self.dtype)).dtype)

    def sample(self, vocab: int, rows: int = 8) -> Case:
        """Rows of every setting: none, each alone, and all together."""
        logits = 4 * self.floats(rows, vocab)
        logits[:, ::7] = -torch.inf
        state = torch.randint(0, 2, (rows, vocab), generator=self.generator, dtype=torch.int32)
        state *= torch.randint(0, 5, (rows, vocab), generator=self.generator, dtype=torch.int32)
        state[:, ::3] += PROMPT_TOKEN

        def setting(number: int, value: float, other: float) -> Tensor:
            own = [value if row in (number, rows - 1) else other for row in range(rows)]
            return torch.tensor(own, device=self.device)

        p = SamplingTensors(
            temperature=0.7 + setting(0, -0.7, 0.0) * (torch.arange(rows) < 1).to(self.device),
            top_k=setting(1, 40, 0).int(),
            top_p=setting(2, 0.8, 1.0),
            min_p=setting(3, 0.05, 0.0),
            repetition_penalty=setting(4, 1.3, 1.0),
            presence_penalty=setting(5, 0.5, 0.0),
            frequency_penalty=setting(6, 0.25, 0.0),
            uniform=torch.rand(rows, generator=self.generator, dtype=torch.float64).to(self.device),
            state_rows=self.ints([row if row > 3 else -1 for row in range(rows)]),
            state=state.to(self.device),
        )

        def case(to: Callable[[Any], Any]) -> Any:
            changed = to(p)
            return ops.sample(to(logits), changed), changed.state

        return case
