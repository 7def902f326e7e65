"""Weights of few bits on a CUDA GPU: int4 and int8 by PyTorch's 4-bit product, fp8 by its scaled one, NF4 by bitsandbytes.

int4 and int8 are the numbers that `QuantisedLinear` holds, put into another order once they are on the card; inputs are not
rounded to 8 bits there, since no product of whole numbers has groups. fp8 and NF4 are made as floats are read, and not
stored. Where `why_not` names a reason, a `QuantisedLinear` stays and multiplies floats that it unpacks at every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import Unsupported
from ..kernels import GROUP, PANEL, PART
from ..model.llava import Llava
from . import linear
from .linear import QuantizedLinear, QuantizedLinearBase, unpack, unpack_parts

MAX_TINYGEMM_ROWS = 128
"""Rows up to which the 4-bit product is used. It reads the weight anew for every 16; unpacking moves some 15 bytes a number and
then multiplies at the full rate. An estimate from published figures, never measured here."""
PACK_ROWS = 4096
"""Outputs that are put into order or unpacked at once, so that no second copy of a large weight is ever there."""
TILE, WIDTH, ALIGNED, LARGEST, BLOCKSIZE = 8, 128, 16, 448.0, 64
"""Outputs of a tile of the 4-bit product and inputs of one; what sizes of an fp8 product are multiples of, and the largest e4m3;
numbers of an NF4 weight that share a scale."""

_pack, _product = torch.ops.aten._convert_weight_to_int4pack, torch.ops.aten._weight_int4pack_mm


class Int4PackedLinear(QuantizedLinearBase):
    """A `QuantisedLinear` in the order of PyTorch's 4-bit product, its scales rounded to bfloat16; for inputs in bfloat16.

    That product knows weights factor * (u - 8) + more, u of 4 bits, with groups of 32 or 128 inputs. One of 8 bits is two of
    them, for inputs that are given twice: q + 128 = 16 * upper + lower.
    weight: int32 `[out / 8, K / 128, 32, 4]`, K the inputs filled up to whole 128, with 8 bits twice as many. scale: bfloat16
    `[K / group, out, 2]`, factor and more. Source: matrix_to_m16n8k16_Bint4_layout in PyTorch's int4mm.cu.
    """

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.kind)
        self.bits, self.bias = linear.bits, linear.bias
        self.group, self.width = (
            PART if linear.bits == 4 else GROUP,
            linear.in_features + -linear.in_features % WIDTH,
        )
        parts = zip(
            linear.weight.split(PACK_ROWS // PANEL),
            linear.scale.split(PACK_ROWS // PANEL),
            strict=True,
        )
        weight, scale = zip(
            *(self._tiled(w, s.transpose(1, 2).flatten(0, 1)) for w, s in parts), strict=True
        )
        self.register_buffer("weight", torch.cat(weight))
        self.register_buffer("scale", torch.cat(scale, 1))
        self.eval()

    def _tiled(self, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and scale of some panels, whose scales are `[out, groups]`."""
        if self.bits == 4:  # step * (u - nought) = step * (u - 8) + step * (8 - nought)
            q, step, nought = unpack_parts(weight)
            factor = (scale.float().repeat_interleave(GROUP // PART, 1) * step).bfloat16()
            more = factor * (8 - nought.bfloat16())
        else:  # 16 * (upper - 8) + (lower - 8) + 8
            stored, scale = unpack(weight, 8), scale.bfloat16()
            q, factor = torch.cat([stored >> 4, stored & 15], 1), torch.cat([16 * scale, scale], 1)
            more = torch.cat([torch.zeros_like(scale), 8 * scale], 1)
        tiles = _pack(q[:, ::2] << 4 | q[:, 1::2], 8)
        assert torch.equal(untiled(tiles), q), (
            "this PyTorch lays out the weights of its 4-bit product otherwise"
        )
        return tiles, torch.stack([factor, more], -1).transpose(0, 1).contiguous()

    def product(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        y = (self._few(rows) if len(rows) <= MAX_TINYGEMM_ROWS else self._many(rows))[
            :, : self.out_features
        ]
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], self.out_features)

    def _few(self, rows: Tensor) -> Tensor:
        rows = filled(rows, WIDTH)
        return _product(
            rows.contiguous() if self.bits == 4 else torch.cat([rows, rows], 1),
            self.weight,
            self.group,
            self.scale,
        )

    def _many(self, rows: Tensor) -> Tensor:
        return torch.cat([rows @ part.t() for part in self._blocks()], 1)

    def unpacked(self) -> Tensor:
        """The weight as it counts in `_many`, `[out, in]`: the product of a whole number and a scale, rounded to bfloat16."""
        return torch.cat(list(self._blocks()))[: self.out_features].float()

    def _blocks(self) -> Iterator[Tensor]:
        """The weight `[out, in]` in bfloat16, some outputs at a time."""
        groups = self.width // self.group
        for tiles, scale in zip(
            self.weight.split(PACK_ROWS // TILE),
            self.scale[-groups:].split(PACK_ROWS, 1),
            strict=True,
        ):
            q, (factor, more) = untiled(tiles), scale.transpose(0, 1)[..., None].unbind(2)
            if self.bits == 8:
                w = (q[:, : self.width] << 4 | q[:, self.width :]).bfloat16().sub_(128).unflatten(
                    1, (-1, GROUP)
                ) * factor
            else:
                w = torch.addcmul(more, q.bfloat16().sub_(8).unflatten(1, (-1, PART)), factor)
            yield w.flatten(1)[:, : self.in_features]


def untiled(tiles: Tensor) -> Tensor:
    """The numbers `[out, K]` of 4 bits, uint8, of a weight in the order of PyTorch's 4-bit product."""
    # A lane of 32 has one output in 8, and 2 neighbouring inputs in 8; its 4 words are of 32 inputs each. Of a word the bytes
    # are [the first or the second neighbour][which 16 inputs], and their halves which 8 of these.
    halves = torch.stack([tiles.view(torch.uint8) & 15, tiles.view(torch.uint8) >> 4], -1)
    lanes = halves.unflatten(3, (4, 2, 2)).unflatten(2, (TILE, 4))
    return lanes.permute(0, 2, 1, 4, 6, 7, 3, 5).flatten(2).flatten(0, 1)


def filled(x: Tensor, multiple: int) -> Tensor:
    """Rows filled up with noughts to a multiple of numbers."""
    return pad(x, (0, -x.shape[-1] % multiple)) if x.shape[-1] % multiple else x


class Float8Linear(QuantizedLinearBase):
    """A linear in float8 (e4m3): a scale for each output, and for each row of inputs as it comes; sums in float32.

    weight: `[out, in]`, both filled up with noughts to whole 16. scale: float32 `[1, out]`.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, "fp8")
        out, features = (size + -size % ALIGNED for size in (out_features, in_features))
        self.register_buffer("weight", torch.empty(out, features, dtype=torch.float8_e4m3fn))
        self.register_buffer("scale", torch.empty(1, out))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.eval()

    def pack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and scale of `[out, in]` weights of any float type."""
        weight, scale = float8(
            pad(rows, (0, -rows.shape[1] % ALIGNED, 0, -rows.shape[0] % ALIGNED))
        )
        return weight, scale.t().contiguous()

    def product(self, x: Tensor) -> Tensor:
        rows, scale = float8(filled(x.reshape(-1, self.in_features), ALIGNED))
        y = torch._scaled_mm(
            rows, self.weight.t(), scale, self.scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        y = y[:, : self.out_features].to(x.dtype)
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], self.out_features)

    def unpacked(self) -> Tensor:
        return (self.weight.float() * self.scale.t())[: self.out_features, : self.in_features]


def float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of floats in float8, and their scales `[rows, 1]` float32, which are never nought."""
    scale = (rows.abs().amax(1, keepdim=True).float() / LARGEST).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    return (rows.float() / scale).to(torch.float8_e4m3fn), scale


class NF4Linear(QuantizedLinearBase):
    """A linear in NF4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314) with a scale for 64 numbers, by bitsandbytes.

    weight: uint8 `[out * K / 2, 1]`, K the inputs filled up with noughts to whole 64. scale: float32 `[out * K / 64]`.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, "nf4")
        self.shape = torch.Size((out_features, in_features + -in_features % BLOCKSIZE))
        self.register_buffer("weight", torch.empty(self.shape.numel() // 2, 1, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(self.shape.numel() // BLOCKSIZE))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.eval()

    def pack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and scale of `[out, in]` weights of any float type."""
        weight, state = _bitsandbytes().functional.quantize_4bit(
            filled(rows.float(), BLOCKSIZE),
            blocksize=BLOCKSIZE,
            compress_statistics=False,
            quant_type="nf4",
        )
        return weight, state.absmax

    def product(self, x: Tensor) -> Tensor:
        return _bitsandbytes().matmul_4bit(
            filled(x, BLOCKSIZE), self.weight.t(), quant_state=self._state(x.dtype), bias=self.bias
        )

    def unpacked(self) -> Tensor:
        return _bitsandbytes().functional.dequantize_4bit(self.weight, self._state(torch.float32))[
            :, : self.in_features
        ]

    def _state(self, dtype: torch.dtype) -> Any:
        state, code = _bitsandbytes().functional.QuantState, _code(self.weight.device)
        return state(
            self.scale, self.shape, code, blocksize=BLOCKSIZE, quant_type="nf4", dtype=dtype
        )


@cache
def _code(device: torch.device) -> Tensor:
    """The 16 numbers of NF4; kept, for a copy to the card cannot be part of a captured step."""
    return _bitsandbytes().functional.get_4bit_type("nf4", device=device)


def _bitsandbytes() -> Any:
    return import_module("bitsandbytes")


FLOATS: dict[str, type[Float8Linear] | type[NF4Linear]] = {"fp8": Float8Linear, "nf4": NF4Linear}
"""By precision: what every linear but the output head becomes. There is no form for them on a CPU, and none to store."""


def prepare(network: Llava, precision: str) -> set[str]:
    """Put linears of few bits without numbers in the place of the network's linears; -> the names of these."""
    if precision not in FLOATS:
        return set(linear.replace_linears(network, precision))
    found = {
        name: m
        for name, m in network.named_modules()
        if isinstance(m, nn.Linear) and name != "lm_head"
    }
    for name, old in found.items():
        with torch.device(old.weight.device):
            network.set_submodule(
                name,
                FLOATS[precision](old.in_features, old.out_features, bias=old.bias is not None),
            )
    return set(found)


def pack_for_cuda(network: Llava) -> None:
    """Put a `TiledLinear` in the place of every `QuantisedLinear` of a network on a card. Of one at a time both are there."""
    for name in [
        name for name, module in network.named_modules() if isinstance(module, QuantizedLinear)
    ]:
        linear = network.get_submodule(name)
        assert isinstance(linear, QuantizedLinear)
        network.set_submodule(name, Int4PackedLinear(linear))


def packed_bytes(linear: QuantizedLinear) -> int:
    """Bytes of weight and scale of what `tile` makes of a linear."""
    outputs, inputs = (
        linear.out_features + -linear.out_features % PANEL,
        linear.in_features + -linear.in_features % WIDTH,
    )
    scales = inputs // PART if linear.bits == 4 else 2 * (inputs // GROUP)
    return outputs * (inputs * linear.bits // 8 + 4 * scales)


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where a network on `device` that computes in `dtype` gets the 4-bit product, else the reason."""
    if device.type != "cuda" or torch.version.hip:
        return "it is there on CUDA GPUs of NVIDIA only"
    if dtype != torch.bfloat16:
        return (
            f"it takes bfloat16, and this network computes in {str(dtype).removeprefix('torch.')}"
        )
    return _too_old(device, (8, 0))


def check(precision: str, device: torch.device) -> None:
    """Raises `Unsupported` where `device` has no linears of this precision."""
    reason = None
    if device.type != "cuda" and precision in FLOATS:
        reason = f"it is there on CUDA GPUs only, and this is {device}; a CPU has int8 and int4"
    elif device.type not in ("cpu", "cuda"):
        reason = f"weights of 4 and 8 bits are for a CPU and for CUDA GPUs, not for {device}; there precision='float16' is fast"
    elif precision == "fp8" and (old := _too_old(device, (8, 9))):
        reason = f"{old}; take int8 or int4"
    elif precision == "nf4":
        try:
            _bitsandbytes()
        except ImportError as error:
            reason = f"it is computed by bitsandbytes, which cannot be imported ({error}); pip install bitsandbytes, or take int4"
    if reason:
        raise Unsupported(f"no {precision} here: {reason}")


def _too_old(device: torch.device, needed: tuple[int, int]) -> str | None:
    if (has := torch.cuda.get_device_capability(device)) >= needed:
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {has[0]}.{has[1]}, and {needed[0]}.{needed[1]} is needed"
