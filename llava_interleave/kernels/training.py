"""What training computes on a CPU besides large products, with gradients, by the compiled kernels:
each reads and writes memory once, and keeps no intermediate tensor for the backward pass.

The plain formulas are the network's; `applies` says whether to call these instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .binding import PANEL, unavailable_reason
from .ops import function

NORM_ROWS = 64  # as in training.h
DTYPES = (torch.float32, torch.bfloat16)
_runs = 0  # that are inside `everywhere`


@contextmanager
def everywhere() -> Iterator[None]:
    """Meanwhile the kernels compute without gradients, too: what a run compares with its steps, as
    a reference model's log-probabilities, has their bits."""
    global _runs
    _runs += 1
    try:
        yield
    finally:
        _runs -= 1


def applies(*tensors: Tensor) -> bool:
    """Whether gradients of these are wanted, or a run wants the same without, on a CPU with
    kernels. All must be plain float32 or bfloat16 tensors."""
    return (
        (_runs > 0 or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)))
        and all(
            t.is_cpu and type(t) in (Tensor, nn.Parameter) and t.dtype in DTYPES for t in tensors
        )
        and unavailable_reason() is None
    )


def packed_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Causal attention within packed sequences in float32: q `[T, H, d]`, k and v `[T, Hkv, d]` ->
    `[T, H, d]`, of v's type."""
    assert len(q) == len(k) == sum(lengths) and k.shape == v.shape, (q.shape, k.shape, lengths)
    assert q.shape[1] % k.shape[1] == 0 and q.shape[2] == k.shape[2], (q.shape, k.shape)
    spans, first = [], 0
    for length in lengths:
        spans.append((first, length))
        first += length
    spans.sort(key=lambda span: -span[1])  # the longest first, so that threads end together
    sequences = torch.tensor(spans, dtype=torch.int64).view(-1, 2)
    wide = (x.float().contiguous() for x in (q, k, v))
    found: Tensor = _PackedAttention.apply(*wide, sequences)  # type: ignore[no-untyped-call]
    return found.to(v.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x [..., D]` by the square root of its mean square, times `weight [D]`, in float32."""
    assert x.shape[-1:] == weight.shape, (x.shape, weight.shape)
    assert x.dtype == weight.dtype == torch.float32, (x.dtype, weight.dtype)
    found: Tensor = _RMSNorm.apply(x.contiguous(), weight.contiguous(), eps)  # type: ignore[no-untyped-call]
    return found


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The two halves of each head of `x [T, H, d]`, rotated against each other by the angles of
    `cos` and `sin [T, 1, d]`, whose halves are equal; in float32."""
    assert cos.shape == sin.shape == (len(x), 1, x.shape[2]), (x.shape, cos.shape, sin.shape)
    assert cos.dtype == sin.dtype == torch.float32, (cos.dtype, sin.dtype)
    found: Tensor = _Rotate.apply(x.float().contiguous(), cos.contiguous(), sin.contiguous())  # type: ignore[no-untyped-call]
    return found


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, rounded once; gate is computed again for the gradient."""
    assert gate.shape == up.shape and gate.dtype == up.dtype, (gate.shape, up.shape)
    found: Tensor = _SwiGLU.apply(gate.contiguous(), up.contiguous())  # type: ignore[no-untyped-call]
    return found


class _PackedAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequences: Tensor) -> Tensor:
        tokens, heads, d = q.shape
        out, normalizers = torch.empty_like(q), q.new_empty(heads, tokens)
        sizes = (len(sequences), tokens, heads, k.shape[1], d)
        _call("packed_attention", _threads(), q, k, v, out, normalizers, sequences, *sizes)
        ctx.save_for_backward(q, k, v, out, normalizers, sequences)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, normalizers, sequences = ctx.saved_tensors
        (tokens, heads, d), kv_heads = q.shape, k.shape[1]
        dq, dk, dv = (torch.empty_like(q) for _ in range(3))
        given = (q, k, v, out, normalizers, gradient.contiguous(), dq, dk, dv, sequences)
        sizes = (len(sequences), tokens, heads, kv_heads, d)
        _call("packed_attention_backward", _threads(), *given, *sizes)
        if heads != kv_heads:
            dk, dv = (x.view(tokens, kv_heads, -1, d).sum(2) for x in (dk, dv))
        return dq, dk, dv, None


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = len(weight)
        rows = x.numel() // width
        y, inverses = torch.empty_like(x), x.new_empty(rows)
        _call("rms_norm", x, weight, eps, y, inverses, rows, width)
        ctx.save_for_backward(x, weight, inverses)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverses = ctx.saved_tensors
        rows, width = len(inverses), len(weight)
        dx, parts = torch.empty_like(x), x.new_empty(-(-rows // NORM_ROWS), width)
        given = (x, weight, inverses, gradient.contiguous(), dx, parts)
        _call("rms_norm_backward", *given, rows, width)
        return dx, parts.sum(0) if ctx.needs_input_grad[1] else None, None


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        y = torch.empty_like(x)
        _call("rotate", x, cos, sin, 1.0, y, *x.shape)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dx = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        _call("rotate", gradient.contiguous(), cos, sin, -1.0, dx, *gradient.shape)
        return dx, None, None


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        _call("swiglu", gate.dtype == torch.bfloat16, gate, up, y, gate.numel())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        given = (gate, up, gradient.contiguous(), dgate, dup)
        _call("swiglu_backward", gate.dtype == torch.bfloat16, *given, gate.numel())
        return dgate, dup


def fits(*sizes: int) -> bool:
    """Whether kernels take rows of so many elements: multiples of a vector's lanes."""
    return all(size % PANEL == 0 for size in sizes)


def _threads() -> int:
    return torch.get_num_threads()


def _call(name: str, *given: Tensor | float) -> None:
    assert all(t.is_contiguous() for t in given if isinstance(t, Tensor)), name
    function(name)(*(t.data_ptr() if isinstance(t, Tensor) else t for t in given))
