"""Packed int8 and int4 weights: quantize, pack, unpack; and the 8-bit rounding of activations.

Two-level group quantization, as in k-quants and QServe: 128 inputs of an output share a float16
scale, w = scale * q. With
8 bits q is stored. With 4 bits 32 inputs share a 4-bit sub_scale and a 4-bit zero_point, and
q = sub_scale * (q_uint4 - zero_point), q_uint4 from 0 to 15.

A packed weight is uint8 `[panels, groups, 2048 or 1088]`, in the order in which a CPU reads it: a
panel is 16 outputs, a group 128 inputs, each filled up with zeros. With 8 bits it holds quads (4
inputs of an output) of q + 128, by input, then by output. With 4 bits it holds first `[16 outputs,
4 subgroups]` bytes sub_scale + 16 * zero_point, then q_uint4, two neighbouring quads in the low and
the high halves of the bytes. Scales are float16 `[panels, groups, 16]`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kernels import GROUP, PANEL, SUBGROUP


def pack(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Packed weight and scale of `[out, in]` weights of any float type."""
    out, features = rows.shape
    groups = pad(rows.float(), (0, -features % GROUP, 0, -out % PANEL)).unflatten(1, (-1, GROUP))
    if bits == 8:
        scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
        stored = _round(groups / scale.float()).clamp(-127, 127) + 128
    else:
        stored, sub_scale, zero_point, scale = _quantize_int4(groups.unflatten(-1, (-1, SUBGROUP)))
    quads = (
        stored.to(torch.uint8)
        .view(-1, PANEL, groups.shape[1], GROUP // 4, 4)
        .permute(0, 2, 3, 1, 4)
    )
    weight = quads.flatten(2)
    if bits == 4:
        sub_scales = (
            (sub_scale + 16 * zero_point)
            .to(torch.uint8)
            .view(-1, PANEL, groups.shape[1], GROUP // SUBGROUP)
            .transpose(1, 2)
        )
        halves = quads[:, :, 0::2] | quads[:, :, 1::2] << 4
        weight = torch.cat([sub_scales.flatten(2), halves.flatten(2)], 2)
    return weight.contiguous(), scale.view(-1, PANEL, groups.shape[1]).transpose(1, 2).contiguous()


def _quantize_int4(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q_uint4, sub_scale, zero_point and scale of weights `[out, groups, subgroups, inputs]`.

    The weight of largest magnitude in a subgroup becomes 0 or 15. Then sub_scales are fitted to the
    integers (least squares), and the scale to both."""
    largest = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    zero_point = torch.where(largest < 0, 8.0, 7.0)
    q = _round(w / (largest.abs() / 8)).clamp(-zero_point, 15 - zero_point)
    fitted = (w * q).sum(-1, keepdim=True) / q.square().sum(-1, keepdim=True).clamp_min(1)
    sub_scale = _round(15 * fitted / fitted.amax(-2, keepdim=True))
    q = sub_scale * _round(w * 15 / (sub_scale * fitted.amax(-2, keepdim=True))).clamp(
        -zero_point, 15 - zero_point
    )
    scale = (w * q).sum((-2, -1), keepdim=True) / q.square().sum((-2, -1), keepdim=True).clamp_min(
        1
    )
    scale = scale.half()
    q = _round(w / (sub_scale * scale.float())).clamp(-zero_point, 15 - zero_point)
    return q + zero_point, sub_scale, zero_point, scale


def _round(x: Tensor) -> Tensor:
    """The nearest integers; 0 where a scale of 0 gave NaN or infinity."""
    return x.nan_to_num(0.0, 0.0, 0.0).round()


def unpack(weight: Tensor, bits: int) -> Tensor:
    """The integers q_uint4 or q + 128, `[out, in]` uint8, of a packed weight or some of its
    panels."""
    quads = weight[..., -PANEL * GROUP * bits // 8 :].unflatten(-1, (-1, PANEL, 4))
    if bits == 4:
        quads = torch.stack([quads & 15, quads >> 4], 3).flatten(2, 3)
    return quads.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)


def unpack_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q_uint4 `[out, in]`, sub_scale and zero_point `[out, in / 32]`, uint8, of a packed weight or
    some of its panels."""
    sub_scales = (
        weight[..., : PANEL * GROUP // SUBGROUP]
        .unflatten(-1, (PANEL, -1))
        .transpose(1, 2)
        .flatten(2)
        .flatten(0, 1)
    )
    return unpack(weight, 4), sub_scales & 15, sub_scales >> 4


def fake_quantize_activations(x: Tensor) -> Tensor:
    """Inputs `[..., in]` float32, rounded to 8 bits as the kernels do: the largest of a group of
    128 becomes 127."""
    groups = pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    factor = torch.full_like(largest, 127) / largest
    # not 127 / largest, which PyTorch computes as 127 * (1 / largest)
    q = (groups * torch.where(largest == 0, 0, factor)).round()
    return (q * (largest / 127)).flatten(-2)[..., : x.shape[-1]]
