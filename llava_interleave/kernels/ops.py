"""Typed entry points of the compiled kernels: they check shapes, types and devices, and hand over
addresses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import binding
from .binding import GROUP, PANEL, group_bytes


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: int) -> Tensor:
    """`[..., in]` times a packed weight (`quantization.packing`), plus the bias: `[..., out]`,
    float32 or bfloat16 as `x` is."""
    features = x.shape[-1]
    panels, groups = -(-out // PANEL), -(-features // GROUP)
    bits = 4 if weight.shape[-1] == group_bytes(4) else 8
    assert weight.shape == (panels, groups, group_bytes(bits)), (x.shape, weight.shape, out)
    assert scale.shape == (panels, groups, PANEL), (weight.shape, scale.shape)
    assert weight.is_contiguous() and scale.is_contiguous()
    assert x.is_cpu and weight.is_cpu and scale.is_cpu, weight.device
    assert weight.dtype == torch.uint8 and scale.dtype == torch.float16, weight.dtype
    assert x.dtype in (torch.float32, torch.bfloat16), x.dtype
    if bias is not None:
        assert bias.shape == (out,) and bias.dtype == x.dtype, (bias.shape, bias.dtype, x.dtype)
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out))
    function("linear")(
        bits,
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        weight.data_ptr(),
        scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // features,
        features,
        out,
    )
    return y


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    at: int,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention of new tokens `[T, H, d]` over a sequence's KV cache -> `[T, H, d]`,
    bfloat16; d is a multiple of 16.

    Their k and v `[T, Hkv, d]` are first written to the positions from `at` on of keys `[Hkv, d,
    capacity]` and values `[Hkv, capacity, d]`: bfloat16, or int8 with float16 scales `[Hkv,
    capacity]` for both. Batch-invariant."""
    (tokens, heads, d), (kv_heads, capacity, _) = q.shape, values.shape
    assert d % PANEL == 0 and heads % kv_heads == 0, (q.shape, values.shape)
    assert 0 <= at <= capacity - tokens, (at, capacity, tokens)
    assert k.shape == v.shape == (tokens, kv_heads, d), (k.shape, v.shape)
    assert keys.shape == (kv_heads, d, capacity), keys.shape
    assert {(t.dtype, t.is_cpu) for t in (q, k, v)} == {(torch.bfloat16, True)}, (q.dtype, q.device)
    assert keys.dtype == values.dtype == (torch.int8 if scales else torch.bfloat16), keys.dtype
    for t in scales or ():
        assert t.shape == (kv_heads, capacity) and t.dtype == torch.float16 and t.is_contiguous()
    assert keys.is_cpu and keys.is_contiguous() and values.is_contiguous(), keys.device
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    pointers = (
        None if t is None else t.data_ptr()
        for t in (q, k, v, keys, values, *(scales or (None, None)), out)
    )
    function("attend")(*pointers, tokens, heads, kv_heads, d, capacity, at)
    return out


def decode(
    hidden: Tensor,
    weights: Tensor,
    shape: Tensor,
    eps: float,
    sequences: Tensor,
    rope: tuple[Tensor, Tensor],
) -> None:
    """All layers of a decoder over `[T, D]` hidden states in bfloat16, in place, in one call
    (`quantization.fused`).

    weights, shape, sequences: int64, the fields of the kernel's structs of these names: addresses
    and sizes. rope: `[T, 1, d]`."""
    assert {t.dtype for t in (weights, shape, sequences)} == {torch.int64}, weights.dtype
    assert hidden.dtype == torch.bfloat16, hidden.dtype
    assert all(t.is_contiguous() and t.is_cpu for t in (hidden, weights, shape, sequences, *rope))
    cos, sin = rope
    assert cos.shape == sin.shape and len(cos) == len(hidden), (cos.shape, hidden.shape)
    assert cos.dtype == sin.dtype == torch.bfloat16, cos.dtype
    function("decode")(
        torch.get_num_threads(),
        shape.data_ptr(),
        weights.data_ptr(),
        eps,
        sequences.data_ptr(),
        len(sequences),
        cos.data_ptr(),
        sin.data_ptr(),
        hidden.data_ptr(),
        len(hidden),
    )


def encode(hidden: Tensor, weights: Tensor, shape: Tensor, eps: float) -> None:
    """All layers of a vision tower over the `[T, D]` hidden states of a crop in bfloat16, in place,
    in one call.

    weights, shape: int64, the fields of the kernel's structs of these names.
    """
    assert weights.dtype == shape.dtype == torch.int64, weights.dtype
    assert hidden.dtype == torch.bfloat16, hidden.dtype
    assert all(t.is_contiguous() and t.is_cpu for t in (hidden, weights, shape))
    function("encode")(
        torch.get_num_threads(),
        shape.data_ptr(),
        weights.data_ptr(),
        eps,
        hidden.data_ptr(),
        len(hidden),
    )


def function(name: str) -> Callable[..., None]:
    """A function of `binding.ARGUMENTS`."""
    functions = binding.library()
    assert not isinstance(functions, str), functions
    return functions[name]
