"""Linears with weights of 4 or 8 bits: groups of 32 inputs share a scale; on a CPU inputs are rounded to 8 bits as they come.

A weight of a group is scale * q: q from -8 to 7 (4 bits) or from -127 to 127 (8 bits), scale in float16. An input x of a group is
largest / 127 * round(x * 127 / largest). `kernels.linear` computes with the integers; without it the same numbers are multiplied
as floats. Results of the two differ by rounding in float32 only. For a GPU see `model.gpu`.

In training mode inputs are not rounded, and gradients go through to what stands before or beside; the weights stay as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from .. import kernels
from ..kernels import GROUP, PANEL
from .llava import Llava

RECIPES: dict[str, dict[str, int]] = {
    "int8": {"*": 8},
    "int4": {"language_model.*": 4, "*": 8},
}
"""By precision: bits of the weights of linears, by the first pattern that their name has. All other tensors stay as they are."""


class FewBits(nn.Module, ABC):
    """A linear whose weight has few bits, in the buffers `weight` and `scale`. kind: the precision that it is of.

    The numbers never change; while training, gradients go through.
    """

    weight: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = in_features, out_features, kind

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            return _Through.apply(x.flatten(0, -2), self).unflatten(0, x.shape[:-1])  # type: ignore[no-untyped-call]
        return self.product(x)

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """What `forward` is when nothing trains."""

    @abstractmethod
    def unpacked(self) -> Tensor:
        """The weight as it counts, `[out, in]` float32."""


class QuantisedLinear(FewBits):
    """A linear whose weight has 4 or 8 bits, packed in the order in which a CPU reads it.

    weight: uint8 `[panels, groups, 64 * bits]`; a panel is 16 outputs. Of every output and 4 inputs a quad of q + 128, quads
    by input, then by output; with 4 bits q + 8, two neighbouring quads in the low and the high halves of the bytes.
    scale: float16 `[panels, groups, 16]`. Outputs and inputs are filled up with noughts to whole panels and groups.
    """

    def __init__(self, in_features: int, out_features: int, bits: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, f"int{bits}")
        assert bits in (4, 8), bits
        self.bits = bits
        panels, groups = -(-out_features // PANEL), -(-in_features // GROUP)
        self.register_buffer("weight", torch.empty(panels, groups, PANEL * GROUP * bits // 8, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(panels, groups, PANEL, dtype=torch.float16))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.eval()

    def product(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":  # inputs are rounded for the sake of the kernels only
            return linear(x, self.unpacked().to(x.dtype), self.bias)
        if kernels.why_not() is None:
            return kernels.linear(x, self.weight, self.scale, self.bias, self.out_features)
        return self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """`product` on a CPU by PyTorch's operators: the weight is unpacked at every call, which is slow."""
        y = linear(rounded(x.float()), self.unpacked(), None if self.bias is None else self.bias.float())
        return y.to(x.dtype)

    def unpacked(self) -> Tensor:
        q = unpack(self.weight, self.bits).float() - (8 if self.bits == 4 else 128)
        w = q.unflatten(1, (-1, GROUP)) * self.scale.transpose(1, 2).flatten(0, 1)[..., None].float()
        return w.flatten(1)[: self.out_features, : self.in_features]


class _Through(torch.autograd.Function):
    """Products of `[T, in]` with the weight as it counts, in the type that autocast asks for. It is unpacked anew for the input's
    gradient and gets none itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: FewBits) -> Tensor:
        wanted = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        ctx.module, ctx.dtype, ctx.wanted = module, x.dtype, wanted
        bias = None if module.bias is None else module.bias.to(wanted)
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.to(wanted), module.unpacked().to(wanted), bias)

    @staticmethod
    def backward(ctx: Any, y: Tensor) -> tuple[Tensor, None]:
        return (y.to(ctx.wanted) @ ctx.module.unpacked().to(ctx.wanted)).to(ctx.dtype), None


def pack(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Weight and scale, as `QuantisedLinear` holds them, of `[out, in]` weights of any float type."""
    out, features = rows.shape
    groups = pad(rows.float(), (0, -features % GROUP, 0, -out % PANEL)).unflatten(1, (-1, GROUP))
    if bits == 8:
        scale = groups.abs().amax(-1, keepdim=True) / 127
    else:  # the largest becomes -8; then the scale is fitted to the whole numbers that this gives
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        q = whole(groups, largest / -8, bits)
        scale = (groups * q).sum(-1, keepdim=True) / q.square().sum(-1, keepdim=True).clamp_min(1)
    scale = scale.half()
    q = whole(groups, scale.float(), bits)
    stored = (q + (8 if bits == 4 else 128)).to(torch.uint8)
    stored = stored.view(-1, PANEL, groups.shape[1], GROUP // 4, 4).permute(0, 2, 3, 1, 4)
    if bits == 4:
        stored = stored[:, :, 0::2] | stored[:, :, 1::2] << 4
    return stored.flatten(2).contiguous(), scale.view(-1, PANEL, groups.shape[1]).transpose(1, 2).contiguous()


def unpack(weight: Tensor, bits: int) -> Tensor:
    """The whole numbers q + 8 or q + 128, `[out, in]` uint8, of a weight as `QuantisedLinear` holds it, or some of its panels."""
    quads = weight.unflatten(-1, (-1, PANEL, 4))
    if bits == 4:
        quads = torch.stack([quads & 15, quads >> 4], 3).flatten(2, 3)
    return quads.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)


def whole(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """x / scale as the nearest whole numbers that `bits` hold; 0 where the scale is."""
    q = (x / scale).nan_to_num(0.0, 0.0, 0.0).round()
    return q.clamp(-8, 7) if bits == 4 else q.clamp(-127, 127)


def rounded(x: Tensor) -> Tensor:
    """Inputs `[..., in]` float32 after the quantisation to 8 bits that a product begins with."""
    groups = pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    factor = torch.full_like(largest, 127) / largest  # not 127 / largest, which PyTorch makes 127 * (1 / largest)
    q = (groups * torch.where(largest == 0, 0, factor)).round()
    return (q * (largest / 127)).flatten(-2)[..., : x.shape[-1]]


def planned(network: Llava, precision: str) -> dict[str, int]:
    """Bits of the weight of every linear that a precision quantises, by the linear's name."""
    found = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    patterns = RECIPES[precision]
    return {name: next(patterns[p] for p in patterns if fnmatchcase(name, p)) for name in found}


def prepare(network: Llava, precision: str) -> dict[str, int]:
    """Put quantised linears without numbers in the place of the network's linears; -> what `planned` says."""
    plan = planned(network, precision)
    for name, bits in plan.items():
        old = network.get_submodule(name)
        assert isinstance(old, nn.Linear)
        with torch.device(old.weight.device):
            new = QuantisedLinear(old.in_features, old.out_features, bits, bias=old.bias is not None)
        network.set_submodule(name, new)
    return plan


def quantised(network: Llava) -> str | None:
    """The precision that a network was quantised to; None for one of floats."""
    return min((module.kind for module in network.modules() if isinstance(module, FewBits)), default=None)
