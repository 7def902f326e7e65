"""Linears with weights of 4 or 8 bits: groups of 128 inputs share a scale; on a CPU inputs are rounded to 8 bits as they come.

A weight of a group is scale * q, scale in float16 and q from -127 to 127. With 8 bits q is stored; with 4 bits it is
step * (u - nought), u from 0 to 15 and step and nought of 4 bits too, one of each for 32 inputs. An input x of a group is
largest / 127 * round(x * 127 / largest). `kernels.linear` computes with the integers; without it the same numbers are multiplied
as floats. Results of the two differ by rounding in float32 only. For a GPU see `model.gpu`.

In training mode inputs are not rounded, and gradients go through to what stands before or beside; the weights stay as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from .. import kernels
from ..kernels import GROUP, PANEL, PART, group_bytes
from ..model.llava import Llava

COMPONENTS = {
    "tower": ("vision_tower.", "multi_modal_projector."),
    "decoder": ("language_model.",),
    "head": ("lm_head",),
}
"""By part of the network: what the names of its linears begin with."""
KINDS = {"int4": 4, "int8": 8, "float": 0}
"""Bits of the weights of a part's linears; 0 where they stay floats."""
RECIPES = {
    "int8": {"tower": 8, "decoder": 8, "head": 8},
    "int4": {"tower": 8, "decoder": 4, "head": 8},
}
"""By precision and part the same. All other tensors stay as they are."""
APART = "int4,head=int4"
"""How a part is told to be otherwise than its precision says; several are possible."""


def parse_precision(precision: str) -> dict[str, int] | None:
    """Bits by part of a precision of the `RECIPES`, also one with parts apart, as `APART` or `int8,tower=float`. None where it is
    none, or leaves all in floats."""
    base, *others = precision.split(",")
    found = dict(RECIPES.get(base, {}))
    for part, _, kind in (other.partition("=") for other in others):
        if part not in found or kind not in KINDS:
            return None
        found[part] = KINDS[kind]
    return found if any(found.values()) else None


def format_precision(bits: dict[str, int]) -> str:
    """The one name of what `parts` tells."""
    base, kinds = (
        "int4" if bits["decoder"] == 4 else "int8",
        {number: kind for kind, number in KINDS.items()},
    )
    return ",".join(
        [
            base,
            *(
                f"{part}={kinds[bits[part]]}"
                for part in COMPONENTS
                if bits[part] != RECIPES[base][part]
            ),
        ]
    )


class QuantizedLinearBase(nn.Module, ABC):
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


class QuantizedLinear(QuantizedLinearBase):
    """A linear whose weight has 4 or 8 bits, packed in the order in which a CPU reads it.

    weight: uint8 `[panels, groups, 2048 or 1088]`; a panel is 16 outputs. Of every output and 4 inputs a quad of q + 128, quads
    by input, then by output; with 4 bits u, two neighbouring quads in the low and the high halves of the bytes, and before them
    step + 16 * nought, `[16 outputs, 4]`. scale: float16 `[panels, groups, 16]`. Outputs and inputs are filled up with noughts
    to whole panels and groups.
    """

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
        if x.device.type != "cpu":  # inputs are rounded for the sake of the kernels only
            return linear(x, self.unpacked().to(x.dtype), self.bias)
        if kernels.unavailable_reason() is None:
            return kernels.linear(x, self.weight, self.scale, self.bias, self.out_features)
        return self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """`product` on a CPU by PyTorch's operators: the weight is unpacked at every call, which is slow."""
        y = linear(
            fake_quantize_activations(x.float()),
            self.unpacked(),
            None if self.bias is None else self.bias.float(),
        )
        return y.to(x.dtype)

    def unpacked(self) -> Tensor:
        if self.bits == 8:
            q = unpack(self.weight, 8).float() - 128
        else:
            u, step, nought = unpack_parts(self.weight)
            q = (
                (u.unflatten(1, (-1, PART)).float() - nought[..., None]) * step[..., None]
            ).flatten(1)
        w = (
            q.unflatten(1, (-1, GROUP))
            * self.scale.transpose(1, 2).flatten(0, 1)[..., None].float()
        )
        return w.flatten(1)[: self.out_features, : self.in_features]


class _Through(torch.autograd.Function):
    """Products of `[T, in]` with the weight as it counts, in the type that autocast asks for. It is unpacked anew for the input's
    gradient and gets none itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: QuantizedLinearBase) -> Tensor:
        wanted = (
            torch.get_autocast_dtype(x.device.type)
            if torch.is_autocast_enabled(x.device.type)
            else x.dtype
        )
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
        scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
        stored = _whole(groups / scale.float()).clamp(-127, 127) + 128
    else:
        stored, step, nought, scale = _four_bits(groups.unflatten(-1, (-1, PART)))
    quads = (
        stored.to(torch.uint8)
        .view(-1, PANEL, groups.shape[1], GROUP // 4, 4)
        .permute(0, 2, 3, 1, 4)
    )
    weight = quads.flatten(2)
    if bits == 4:
        steps = (
            (step + 16 * nought)
            .to(torch.uint8)
            .view(-1, PANEL, groups.shape[1], GROUP // PART)
            .transpose(1, 2)
        )
        weight = torch.cat(
            [steps.flatten(2), (quads[:, :, 0::2] | quads[:, :, 1::2] << 4).flatten(2)], 2
        )
    return weight.contiguous(), scale.view(-1, PANEL, groups.shape[1]).transpose(1, 2).contiguous()


def _four_bits(parse_precision: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, step, nought and scale of weights `[out, groups, parts, inputs]`: a part's largest weight becomes 0 or 15, then the
    steps are fitted to the u that this gives, and the scale to both."""
    largest = parse_precision.gather(-1, parse_precision.abs().argmax(-1, keepdim=True))
    nought = torch.where(largest < 0, 8.0, 7.0)
    near = _whole(parse_precision / (largest.abs() / 8)).clamp(-nought, 15 - nought)
    fitted = (parse_precision * near).sum(-1, keepdim=True) / near.square().sum(
        -1, keepdim=True
    ).clamp_min(1)
    step = _whole(15 * fitted / fitted.amax(-2, keepdim=True))
    near = step * _whole(parse_precision * 15 / (step * fitted.amax(-2, keepdim=True))).clamp(
        -nought, 15 - nought
    )
    scale = (parse_precision * near).sum((-2, -1), keepdim=True) / near.square().sum(
        (-2, -1), keepdim=True
    ).clamp_min(1)
    scale = scale.half()
    u = _whole(parse_precision / (step * scale.float())).clamp(-nought, 15 - nought) + nought
    return u, step, nought, scale


def _whole(x: Tensor) -> Tensor:
    """The nearest whole numbers; 0 for what a scale of 0 gave."""
    return x.nan_to_num(0.0, 0.0, 0.0).round()


def unpack(weight: Tensor, bits: int) -> Tensor:
    """The numbers u or q + 128, `[out, in]` uint8, of a weight as `QuantisedLinear` holds it, or some of its panels."""
    quads = weight[..., -PANEL * GROUP * bits // 8 :].unflatten(-1, (-1, PANEL, 4))
    if bits == 4:
        quads = torch.stack([quads & 15, quads >> 4], 3).flatten(2, 3)
    return quads.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)


def unpack_parts(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u `[out, in]`, step and nought `[out, in / 32]`, uint8, of a weight of 4 bits or some of its panels."""
    steps = (
        weight[..., : PANEL * GROUP // PART]
        .unflatten(-1, (PANEL, -1))
        .transpose(1, 2)
        .flatten(2)
        .flatten(0, 1)
    )
    return unpack(weight, 4), steps & 15, steps >> 4


def fake_quantize_activations(x: Tensor) -> Tensor:
    """Inputs `[..., in]` float32 after the quantisation to 8 bits that a product begins with."""
    groups = pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    factor = (
        torch.full_like(largest, 127) / largest
    )  # not 127 / largest, which PyTorch makes 127 * (1 / largest)
    q = (groups * torch.where(largest == 0, 0, factor)).round()
    return (q * (largest / 127)).flatten(-2)[..., : x.shape[-1]]


def bits_per_linear(network: Llava, precision: str) -> dict[str, int]:
    """Bits of the weight of every linear that a precision quantises, by the linear's name."""
    bits = parse_precision(precision)
    assert bits is not None, precision
    found = (
        (name, bits[part_of(name)])
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    )
    return {name: number for name, number in found if number}


def part_of(name: str) -> str:
    """Of the network, that a linear's name tells."""
    return next(part for part, beginnings in COMPONENTS.items() if name.startswith(beginnings))


def replace_linears(network: Llava, precision: str) -> dict[str, int]:
    """Put quantised linears without numbers in the place of the network's linears; -> what `planned` says."""
    plan = bits_per_linear(network, precision)
    for name, bits in plan.items():
        old = network.get_submodule(name)
        assert isinstance(old, nn.Linear)
        with torch.device(old.weight.device):
            new = QuantizedLinear(
                old.in_features, old.out_features, bits, bias=old.bias is not None
            )
        network.set_submodule(name, new)
    return plan


def quantised(network: Llava) -> str | None:
    """The precision that a network was quantised to; None for one of floats."""
    kinds = {
        part_of(name): module.kind
        for name, module in network.named_modules()
        if isinstance(module, QuantizedLinearBase)
    }
    if not kinds or (others := kinds.values() - KINDS.keys()):  # fp8 or nf4
        return min(others) if kinds else None
    return format_precision({one: KINDS[kinds.get(one, "float")] for one in COMPONENTS})
