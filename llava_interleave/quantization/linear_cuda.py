"""Quantized linears on a CUDA GPU: int4 and int8 by a Triton product, fp8 by PyTorch's scaled one,
NF4 by bitsandbytes.

int4 and int8 are the integers and scales of a `QuantizedLinear`, repacked once they are on the GPU.
Activations are not rounded to 8 bits there. fp8 and NF4 are quantized from floats while loading,
and not stored. Where `kernels.triton.unavailable_reason` returns a reason, a `QuantizedLinear`
stays and dequantizes at every call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import Unsupported
from ..kernels import PANEL
from ..kernels.triton import PackedWeight, dequantize, packed_linear
from .linear_cpu import QuantizedLinear, QuantizedLinearBase
from .packing import unpack, unpack_int4
from .precision import CUDA_ONLY

PACK_ROWS = 4096
"""Outputs that are repacked at once."""
FP8_MULTIPLE, FP8_MAX = 16, 448.0
"""Sizes of an fp8 product are multiples of this; the largest e4m3 number."""
NF4_BLOCK = 64
"""NF4 weights that share a scale."""


class TritonLinear(QuantizedLinearBase):
    """An int8 or int4 linear by the Triton product: the integers and scales of a
    `QuantizedLinear`, in another order. Inputs are float16 or bfloat16.

    weight, scale, sub_scale: words, scales and sub_scales of `kernels.triton.PackedWeight`."""

    sub_scale: Tensor | None

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None) -> None:
        kind = "int8" if packed.sub_scales is None else "int4"
        super().__init__(packed.in_features, packed.out_features, kind)
        self.register_buffer("weight", packed.words)
        self.register_buffer("scale", packed.scales)
        self.register_buffer("sub_scale", packed.sub_scales)
        self.bias = bias
        self.eval()

    @classmethod
    def repack(cls, linear: QuantizedLinear) -> TritonLinear:
        """The same weight, some outputs at a time: unpacked it is several times as large."""
        parts = [_repack(weight, linear.bits) for weight in linear.weight.split(PACK_ROWS // PANEL)]
        words, sub_scales = (torch.cat(part) for part in zip(*parts, strict=True))
        own = sub_scales if linear.bits == 4 else None
        scales = linear.scale.transpose(1, 2).flatten(0, 1).contiguous()
        return cls(
            PackedWeight(words, scales, own, linear.out_features, linear.in_features), linear.bias
        )

    @classmethod
    def merge(cls, linears: Sequence[TritonLinear]) -> TritonLinear | None:
        """One linear with the outputs of all, whose weights become views of its own.

        None where bits, inputs or biases differ, or outputs are no multiples of 16."""
        alike = {(one.kind, one.in_features, one.bias is None) for one in linears}
        if len(alike) > 1 or any(one.out_features % PANEL for one in linears[:-1]):
            return None

        def joined(name: str) -> Any:
            parts = [getattr(one, name) for one in linears]
            if parts[0] is None:
                return None
            whole = torch.cat(parts)
            for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
                part.data = view
            return whole

        outputs = sum(one.out_features for one in linears)
        inputs, bias = linears[0].in_features, joined("bias")
        return cls(
            PackedWeight(joined("weight"), joined("scale"), joined("sub_scale"), outputs, inputs),
            None if bias is None else nn.Parameter(bias, requires_grad=False),
        )

    @property
    def packed(self) -> PackedWeight:
        sizes = self.out_features, self.in_features
        return PackedWeight(self.weight, self.scale, self.sub_scale, *sizes)

    def product(self, x: Tensor) -> Tensor:
        y = packed_linear(x.reshape(-1, self.in_features), self.packed, self.bias)
        return y.reshape(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Tensor:
        return dequantize(self.packed, torch.float32)


def _repack(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Words and sub_scales (none with 8 bits) of some panels of a packed weight."""
    outputs, groups = len(weight) * PANEL, weight.shape[1]
    if bits == 8:
        q, sub_scales = unpack(weight, 8), weight.new_empty(0)
    else:
        q, sub_scale, zero_point = unpack_int4(weight)
        sub_scales = (sub_scale | zero_point << 4).view(outputs, groups, 4)
    numbers = q.view(outputs, groups, bits, 32 // bits, 4).transpose(3, 4)  # of each word
    if bits == 4:
        numbers = numbers[..., 0::2] | numbers[..., 1::2] << 4
    return numbers.contiguous().view(torch.int32).squeeze(-1), sub_scales


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
