"""int8 and int4 linears for a CPU (`packing` has the format); on other devices they dequantize at
every call.

On a CPU activations are rounded to 8 bits in groups of 128, so that a group's product is exact in
integers: `kernels.linear`. Without compiled kernels the same numbers are multiplied as floats. The
results of the two differ by float32 rounding only. While training, activations are not rounded, and
gradients pass through to the layers before and to adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .. import kernels
from ..kernels import GROUP, PANEL, SUBGROUP, group_bytes
from .packing import fake_quantize_activations, unpack, unpack_int4


class QuantizedLinearBase(nn.Module, ABC):
    """A linear whose weight is quantized, in the buffers `weight` and `scale`. kind: its precision.

    The weight is frozen; while training, gradients pass through.
    """

    weight: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = in_features, out_features, kind

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            return _DequantizedLinear.apply(x.flatten(0, -2), self).unflatten(0, x.shape[:-1])  # type: ignore[no-untyped-call]
        return self.product(x)

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """`forward` without gradients."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The weight, `[out, in]` float32."""


class QuantizedLinear(QuantizedLinearBase):
    """A linear with a packed weight of 4 or 8 bits: `weight` uint8 and `scale` float16, as
    `packing.pack` returns them."""

    def __init__(self, in_features: int, out_features: int, bits: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, f"int{bits}")
        assert bits in (4, 8), bits
        self.bits = bits
        panels, groups = -(-out_features // PANEL), -(-in_features // GROUP)
        self.register_buffer(
            "weight", torch.empty(panels, groups, group_bytes(bits), dtype=torch.uint8)
        )
        self.register_buffer("scale", torch.empty(panels, groups, PANEL, dtype=torch.float16))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.eval()

    def product(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":  # only the CPU kernels need rounded activations
            return linear(x, self.dequantize().to(x.dtype), self.bias)
        if kernels.unavailable_reason() is None:
            return kernels.linear(x, self.weight, self.scale, self.bias, self.out_features)
        return self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """`product` on a CPU by PyTorch's operators; slow, as it dequantizes the weight at every
        call."""
        bias = None if self.bias is None else self.bias.float()
        return linear(fake_quantize_activations(x.float()), self.dequantize(), bias).to(x.dtype)

    def dequantize(self) -> Tensor:
        if self.bits == 8:
            q = unpack(self.weight, 8).float() - 128
        else:
            q_uint4, sub_scale, zero_point = unpack_int4(self.weight)
            subgroups = q_uint4.unflatten(1, (-1, SUBGROUP)).float()
            q = ((subgroups - zero_point[..., None]) * sub_scale[..., None]).flatten(1)
        scale = self.scale.transpose(1, 2).flatten(0, 1)[..., None].float()
        w = q.unflatten(1, (-1, GROUP)) * scale
        return w.flatten(1)[: self.out_features, : self.in_features]


class _DequantizedLinear(torch.autograd.Function):
    """Product of `[T, in]` with the dequantized weight, in autocast's type. It is dequantized again
    for the gradient of the input; the weight has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: QuantizedLinearBase) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.module, ctx.input_dtype, ctx.dtype = module, x.dtype, dtype
        bias = None if module.bias is None else module.bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            return linear(x.to(dtype), module.dequantize().to(dtype), bias)

    @staticmethod
    def backward(ctx: Any, y: Tensor) -> tuple[Tensor, None]:
        weight = ctx.module.dequantize().to(ctx.dtype)
        return (y.to(ctx.dtype) @ weight).to(ctx.input_dtype), None
