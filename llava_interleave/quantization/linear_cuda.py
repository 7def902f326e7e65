"""Quantized linears on a CUDA GPU: int4 and int8 by PyTorch's 4-bit product, fp8 by its scaled one,
NF4 by bitsandbytes.

int4 and int8 are the integers of a `QuantizedLinear`, repacked once they are on the GPU.
Activations are not rounded to 8 bits there, as no integer product on a GPU has groups. fp8 and NF4
are quantized from floats while loading, and not stored. Where `unavailable_reason` returns a
reason, a `QuantizedLinear` stays and dequantizes at every call."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import Unsupported
from ..kernels import GROUP, PANEL, SUBGROUP
from .linear_cpu import QuantizedLinear, QuantizedLinearBase
from .packing import unpack, unpack_int4
from .precision import CUDA_ONLY

MAX_TINYGEMM_ROWS = 128
"""Rows up to which the 4-bit product is used. It reads the weight again for every 16 rows;
dequantizing moves some 15 bytes per weight and then multiplies at the full rate. Estimated from
published figures, not measured here."""
PACK_ROWS = 4096
"""Outputs that are repacked or dequantized at once, so that no second copy of a large weight
exists."""
TILE_OUTPUTS, TILE_INPUTS = 8, 128
"""Size of a tile of the 4-bit product."""
FP8_MULTIPLE, FP8_MAX = 16, 448.0
"""Sizes of an fp8 product are multiples of this; the largest e4m3 number."""
NF4_BLOCK = 64
"""NF4 weights that share a scale."""

_pack, _product = torch.ops.aten._convert_weight_to_int4pack, torch.ops.aten._weight_int4pack_mm


class Int4PackedLinear(QuantizedLinearBase):
    """A `QuantizedLinear` repacked for PyTorch's 4-bit product (tinygemm), scales rounded to
    bfloat16; inputs in bfloat16.

    That product has weights factor * (q_uint4 - 8) + offset, in groups of 32 or 128 inputs. An int8
    weight is two of them, for inputs that are given twice: q + 128 = 16 * upper + lower.
    weight: int32 `[out / 8, K / 128, 32, 4]`, K the inputs padded to a multiple of 128, with 8 bits
    twice as many. scale: bfloat16 `[K / group, out, 2]`, factor and offset. Source:
    matrix_to_m16n8k16_Bint4_layout in PyTorch's int4mm.cu."""

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.kind)
        self.bits, self.bias = linear.bits, linear.bias
        self.group = SUBGROUP if linear.bits == 4 else GROUP
        self.padded_inputs = linear.in_features + -linear.in_features % TILE_INPUTS
        parts = zip(
            linear.weight.split(PACK_ROWS // PANEL),
            linear.scale.split(PACK_ROWS // PANEL),
            strict=True,
        )
        weight, scale = zip(
            *(self._repack(w, s.transpose(1, 2).flatten(0, 1)) for w, s in parts), strict=True
        )
        self.register_buffer("weight", torch.cat(weight))
        self.register_buffer("scale", torch.cat(scale, 1))
        self.eval()

    def _repack(self, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and scale of some panels, whose scales are `[out, groups]`."""
        if self.bits == 4:
            # sub_scale * (q - zero_point) = sub_scale * (q - 8) + sub_scale * (8 - zero_point)
            q, sub_scale, zero_point = unpack_int4(weight)
            factor = (scale.float().repeat_interleave(GROUP // SUBGROUP, 1) * sub_scale).bfloat16()
            offset = factor * (8 - zero_point.bfloat16())
        else:  # 16 * (upper - 8) + (lower - 8) + 8
            stored, scale = unpack(weight, 8), scale.bfloat16()
            q, factor = torch.cat([stored >> 4, stored & 15], 1), torch.cat([16 * scale, scale], 1)
            offset = torch.cat([torch.zeros_like(scale), 8 * scale], 1)
        tiles = _pack(q[:, ::2] << 4 | q[:, 1::2], 8)
        assert torch.equal(unpack_tiles(tiles), q), (
            "this PyTorch packs the weights of its 4-bit product in another order"
        )
        return tiles, torch.stack([factor, offset], -1).transpose(0, 1).contiguous()

    def product(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        multiply = self._tinygemm if len(rows) <= MAX_TINYGEMM_ROWS else self._dequantized
        y = multiply(rows)[:, : self.out_features]
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], self.out_features)

    def _tinygemm(self, rows: Tensor) -> Tensor:
        rows = pad_inputs(rows, TILE_INPUTS)
        return _product(
            rows.contiguous() if self.bits == 4 else torch.cat([rows, rows], 1),
            self.weight,
            self.group,
            self.scale,
        )

    def _dequantized(self, rows: Tensor) -> Tensor:
        return torch.cat([rows @ block.t() for block in self._blocks()], 1)

    def dequantize(self) -> Tensor:
        """The weight of `_dequantized`: the product of an integer and a scale, rounded to
        bfloat16."""
        return torch.cat(list(self._blocks()))[: self.out_features].float()

    def _blocks(self) -> Iterator[Tensor]:
        """The weight `[out, in]` in bfloat16, some outputs at a time."""
        groups = self.padded_inputs // self.group
        for tiles, scale in zip(
            self.weight.split(PACK_ROWS // TILE_OUTPUTS),
            self.scale[-groups:].split(PACK_ROWS, 1),
            strict=True,
        ):
            q = unpack_tiles(tiles)
            factor, offset = scale.transpose(0, 1)[..., None].unbind(2)
            if self.bits == 8:
                upper, lower = q[:, : self.padded_inputs], q[:, self.padded_inputs :]
                signed = (upper << 4 | lower).bfloat16().sub_(128)
                w = signed.unflatten(1, (-1, GROUP)) * factor
            else:
                signed = q.bfloat16().sub_(8)
                w = torch.addcmul(offset, signed.unflatten(1, (-1, SUBGROUP)), factor)
            yield w.flatten(1)[:, : self.in_features]


def unpack_tiles(tiles: Tensor) -> Tensor:
    """The integers `[out, K]` of 4 bits, uint8, of a weight packed for PyTorch's 4-bit product."""
    # A lane of 32 has one output in 8, and 2 neighboring inputs in 8; its 4 words are of 32 inputs
    # each. The bytes of a word are [first or second neighbor][which 16 inputs], and their halves
    # are which 8 of these.
    halves = torch.stack([tiles.view(torch.uint8) & 15, tiles.view(torch.uint8) >> 4], -1)
    lanes = halves.unflatten(3, (4, 2, 2)).unflatten(2, (TILE_OUTPUTS, 4))
    return lanes.permute(0, 2, 1, 4, 6, 7, 3, 5).flatten(2).flatten(0, 1)


def pad_inputs(x: Tensor, multiple: int) -> Tensor:
    """Rows padded with zeros to a multiple of `multiple` inputs."""
    return pad(x, (0, -x.shape[-1] % multiple)) if x.shape[-1] % multiple else x


class Float8Linear(QuantizedLinearBase):
    """A linear in float8 (e4m3): a scale per output, and per row of activations; sums in float32.

    weight: `[out, in]`, both padded with zeros to a multiple of 16. scale: float32 `[1, out]`.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, "fp8")
        out, features = (size + -size % FP8_MULTIPLE for size in (out_features, in_features))
        self.register_buffer("weight", torch.empty(out, features, dtype=torch.float8_e4m3fn))
        self.register_buffer("scale", torch.empty(1, out))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.eval()

    def pack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and scale of `[out, in]` weights of any float type."""
        weight, scale = float8(
            pad(rows, (0, -rows.shape[1] % FP8_MULTIPLE, 0, -rows.shape[0] % FP8_MULTIPLE))
        )
        return weight, scale.t().contiguous()

    def product(self, x: Tensor) -> Tensor:
        rows, scale = float8(pad_inputs(x.reshape(-1, self.in_features), FP8_MULTIPLE))
        y = torch._scaled_mm(
            rows, self.weight.t(), scale, self.scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        y = y[:, : self.out_features].to(x.dtype)
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Tensor:
        return (self.weight.float() * self.scale.t())[: self.out_features, : self.in_features]


def float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of floats in float8, and their scales `[rows, 1]` float32, which are never 0."""
    scale = (rows.abs().amax(1, keepdim=True).float() / FP8_MAX).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    return (rows.float() / scale).to(torch.float8_e4m3fn), scale


class NF4Linear(QuantizedLinearBase):
    """A linear in NF4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314) with a scale per 64 weights,
    by bitsandbytes.

    weight: uint8 `[out * K / 2, 1]`, K the inputs padded with zeros to a multiple of 64. scale:
    float32 `[out * K / 64]`."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, "nf4")
        self.shape = torch.Size((out_features, in_features + -in_features % NF4_BLOCK))
        self.register_buffer("weight", torch.empty(self.shape.numel() // 2, 1, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(self.shape.numel() // NF4_BLOCK))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.eval()

    def pack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and scale of `[out, in]` weights of any float type."""
        weight, state = _bitsandbytes().functional.quantize_4bit(
            pad_inputs(rows.float(), NF4_BLOCK),
            blocksize=NF4_BLOCK,
            compress_statistics=False,
            quant_type="nf4",
        )
        return weight, state.absmax

    def product(self, x: Tensor) -> Tensor:
        return _bitsandbytes().matmul_4bit(
            pad_inputs(x, NF4_BLOCK),
            self.weight.t(),
            quant_state=self._state(x.dtype),
            bias=self.bias,
        )

    def dequantize(self) -> Tensor:
        return _bitsandbytes().functional.dequantize_4bit(self.weight, self._state(torch.float32))[
            :, : self.in_features
        ]

    def _state(self, dtype: torch.dtype) -> Any:
        state, code = _bitsandbytes().functional.QuantState, _code(self.weight.device)
        return state(
            self.scale, self.shape, code, blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype
        )


@cache
def _code(device: torch.device) -> Tensor:
    """The 16 numbers of NF4, cached: a CUDA graph cannot capture the copy to the GPU."""
    return _bitsandbytes().functional.get_4bit_type("nf4", device=device)


def _bitsandbytes() -> Any:
    return import_module("bitsandbytes")


def packed_bytes(linear: QuantizedLinear) -> int:
    """Bytes of weight and scale of the `Int4PackedLinear` made of a linear."""
    outputs = linear.out_features + -linear.out_features % PANEL
    inputs = linear.in_features + -linear.in_features % TILE_INPUTS
    scales = inputs // SUBGROUP if linear.bits == 4 else 2 * (inputs // GROUP)
    return outputs * (inputs * linear.bits // 8 + 4 * scales)


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where a network on `device` that computes in `dtype` can use the 4-bit product, else the
    reason."""
    if device.type != "cuda" or torch.version.hip:
        return "it needs a CUDA GPU of NVIDIA"
    if dtype != torch.bfloat16:
        return (
            f"it takes bfloat16, and this network computes in {str(dtype).removeprefix('torch.')}"
        )
    return _too_old(device, (8, 0))


def check_supported(precision: str, device: torch.device) -> None:
    """Raises `Unsupported` where `device` has no linears of this precision."""
    if device.type != "cuda" and precision in CUDA_ONLY:
        reason = "it needs a CUDA GPU; use int8 or int4"
    elif device.type not in ("cpu", "cuda"):
        reason = "int4 and int8 need a CPU or a CUDA GPU; use precision float16"
    elif precision == "fp8" and (old := _too_old(device, (8, 9))):
        reason = f"{old}; use int8 or int4"
    elif precision == "nf4":
        try:
            _bitsandbytes()
            return
        except ImportError as error:
            reason = (
                f"it needs bitsandbytes, which cannot be imported ({error}); "
                "pip install bitsandbytes, or use int4"
            )
    else:
        return
    raise Unsupported(f"{precision} is not supported on {device}: {reason}")


def _too_old(device: torch.device, needed: tuple[int, int]) -> str | None:
    if (capability := torch.cuda.get_device_capability(device)) >= needed:
        return None
    name, (major, minor) = torch.cuda.get_device_name(device), capability
    return f"{name} has compute capability {major}.{minor}, and {needed[0]}.{needed[1]} is needed"
