"""Where a network runs and in which numbers, when nobody says."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

from . import kernels
from .checkpoints import size, skeleton
from .checkpoints.files import read_config, read_headers, stored_precision
from .checkpoints.load import device_named
from .checkpoints.safetensors_file import FLOATS
from .engine import bytes_per_token
from .engine.kv_budget import profile_kv_bytes
from .errors import OptionError
from .model import Llava
from .quantization import linear_cuda
from .quantization.precision import (
    CUDA_ONLY,
    PER_COMPONENT,
    RECIPES,
    format_precision,
    parse_precision,
)
from .quantization.replace import quantized_precision

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = 100_000_000
"""A network of at most this many parameters runs in float32: 400 MB at most, and exact."""
PRECISIONS = ("auto", *DTYPES, *RECIPES, *CUDA_ONLY)
MIN_FREE_BYTES, TOKENS = 1 << 30, 4096
"""What a card must have left beside the weights: bytes for activations and libraries, and keys and values of so many tokens."""


def named_dtype(name: str) -> torch.dtype:
    """float32, bfloat16 or float16 by name."""
    if name not in DTYPES:
        raise OptionError(f"{name!r} is no precision; there are {', '.join(DTYPES)}")
    return DTYPES[name]


def pick_precision(precision: str, folder: Path, device: str) -> tuple[torch.dtype, str | None]:
    """The type that is computed in, and the precision that weights of linears are quantized to; None leaves them as they are.

    `auto` takes a quantized folder as it is. Where it would compute in bfloat16 on a CPU and there are kernels, it quantizes to
    int8: decoding is five times as fast, and answers lose nothing that was measurable (docs/performance.md). Raises `OptionError`
    for another precision than the folder's, `Unsupported` for one that the device has no linears for.
    """
    if bits := parse_precision(precision):
        precision = format_precision(bits)
    elif precision not in PRECISIONS:
        apart = f"int8 and int4 also with tower, decoder or head apart, in int4, int8 or float, as in {PER_COMPONENT}"
        raise OptionError(
            f"{precision!r} is no precision; there are {', '.join(PRECISIONS)}, {apart}"
        )
    held = stored_precision(folder)
    if held and precision not in ("auto", held):
        raise OptionError(
            f"{folder} holds {held} weights; for {precision} name the checkpoint that it was made from"
        )
    if few := held or (precision if bits or precision in CUDA_ONLY else None):
        linear_cuda.check_supported(few, torch.device(device))
        kept = (
            0 in (parse_precision(few) or {}).values() and device == "cpu"
        )  # a part in floats, which PyTorch multiplies
        return torch.float32 if kept and not kernels.multiplies_bfloat16() else pick_dtype(
            "auto", folder, device
        ), few
    dtype = pick_dtype(precision, folder, device)
    faster = (
        precision == "auto"
        and dtype == torch.bfloat16
        and device == "cpu"
        and kernels.unavailable_reason() is None
    )
    return dtype, "int8" if faster else None


def warn_if_slow(precision: str | None, dtype: torch.dtype, device: str) -> None:
    """Say so where there is no product for the weights: quantized ones are unpacked at every call, others multiplied number by
    number."""
    on_cpu = device == "cpu"
    if (
        precision is None
        and dtype != torch.float32
        and on_cpu
        and not kernels.multiplies_bfloat16()
    ):
        number, faster = (
            str(dtype).removeprefix("torch."),
            "float32 is" if kernels.unavailable_reason() else "int8 and float32 are",
        )
        warnings.warn(
            f"this CPU has no products in {number}: {faster} a hundred times as fast", stacklevel=3
        )
    if precision is None or precision in CUDA_ONLY:
        return
    if (
        reason := kernels.unavailable_reason()
        if on_cpu
        else linear_cuda.unavailable_reason(torch.device(device), dtype)
    ):
        kind = "compiled kernels" if on_cpu else "4-bit product"
        warnings.warn(
            f"no {kind} for {precision} ({reason}): it is many times slower than bfloat16 here",
            stacklevel=3,
        )


def linear_backend(model: Llava) -> str:
    """What computes the linears of a network."""
    few, weight = quantized_precision(model), model.language_model.norm.weight
    if few is None:
        return "PyTorch"
    if few in CUDA_ONLY:
        return "bitsandbytes" if few == "nf4" else "PyTorch's scaled product"
    on_cpu = weight.device.type == "cpu"
    if (
        reason := kernels.unavailable_reason()
        if on_cpu
        else linear_cuda.unavailable_reason(weight.device, weight.dtype)
    ):
        return f"PyTorch, which unpacks the weights at every call: {reason}"
    return "compiled kernels" if on_cpu else "PyTorch's 4-bit product"


def pick_device(name: str, folder: Path | None = None, precision: str = "auto") -> str:
    """`auto` is the current CUDA GPU where there is one and the network of `folder` fits, else the CPU; a warning says what is
    too large. Raises `Unsupported` for a device that is not here."""
    if name != "auto":
        return str(device_named(name))
    if not torch.cuda.is_available():
        return "cpu"
    if folder and (reason := too_large(folder, precision)):
        warnings.warn(
            f"{reason}: it runs on the CPU; precision int4 is smaller, device cuda insists",
            stacklevel=3,
        )
        return "cpu"
    return "cuda"


def too_large(folder: Path, precision: str) -> str | None:
    """None where the network of a folder fits beside what is on the current CUDA GPU already, else the numbers."""
    config, (dtype, few) = read_config(folder), pick_precision(precision, folder, "cuda")
    kv = min(TOKENS, config.text.context) * bytes_per_token(config.text, dtype)
    need, (free, _) = (
        size(config, dtype, few, "cuda") + kv + MIN_FREE_BYTES,
        torch.cuda.mem_get_info(),
    )
    if need <= free:
        return None
    numbers = few or str(dtype).removeprefix("torch.")
    return f"the network needs {need / 2**30:.1f} GiB in {numbers}, and the GPU has {free / 2**30:.1f} free"


def pick_dtype(precision: str, folder: Path, device: str) -> torch.dtype:
    """`auto`: float32 for a small network, and on a CPU for one stored in it or where neither kernels nor PyTorch are fast beside
    bfloat16; else that, or float16 on a GPU without it and on Apple's.

    A folder whose tensors were not fetched counts as stored in 16 bits, as the published checkpoints are.
    """
    if precision != "auto":
        return named_dtype(precision)
    if sum(parameter.numel() for parameter in skeleton(read_config(folder)).parameters()) <= SMALL:
        return torch.float32
    if device.startswith("cuda"):
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    if device == "mps":
        return torch.float16
    if (
        not kernels.multiplies_bfloat16() and kernels.unavailable_reason() is not None
    ):  # in this order: the second may compile them
        return torch.float32
    if next(folder.glob("*.safetensors"), None) is None:
        return torch.bfloat16
    stored = max(read_headers(folder).values(), key=lambda tensor: tensor.bytes).dtype
    return torch.float32 if FLOATS.get(stored) == torch.float32 else torch.bfloat16


def kv_memory(model: Llava, precision: str = "auto") -> int:
    """Bytes for keys and values: on a CUDA GPU what the largest step leaves; else two full contexts, one to keep while the other
    runs, at most a quarter of the memory."""
    weight = model.language_model.norm.weight
    if weight.is_cuda:
        return profile_kv_bytes(model, kv_precision=precision)
    text = model.config.text
    wanted = (
        2 * text.context * bytes_per_token(text, weight.dtype, in_eight_bits=precision == "int8")
    )
    memory = 16 << 30
    if sys.platform != "win32" and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(wanted, memory // 4)
