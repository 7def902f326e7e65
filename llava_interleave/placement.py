"""Selection of device, dtype and precision, and the size of the KV cache."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

from . import kernels
from .checkpoints import Checkpoint, weight_bytes
from .checkpoints.load import get_device
from .checkpoints.safetensors_file import FLOATS
from .engine import bytes_per_token
from .engine.kv_budget import profile_kv_bytes
from .errors import OptionError
from .kernels import triton
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
MAX_FLOAT32_PARAMETERS = 100_000_000
"""A network of at most this many parameters runs in float32: 400 MB at most, and exact."""
PRECISIONS = ("auto", *DTYPES, *RECIPES, *CUDA_ONLY)
MIN_FREE_BYTES, MIN_KV_TOKENS = 1 << 30, 4096
"""Free memory that a GPU needs in addition to the weights: for activations and libraries in bytes,
and for the KV cache in tokens."""

Source = Checkpoint | str | Path


def named_dtype(name: str) -> torch.dtype:
    """float32, bfloat16 or float16 by name."""
    if name not in DTYPES:
        raise OptionError(f"unknown precision {name!r}; choose {', '.join(DTYPES)}")
    return DTYPES[name]


def pick_precision(precision: str, source: Source, device: str) -> tuple[torch.dtype, str | None]:
    """The dtype of activations, and the precision that linears are quantized to (None: floats).

    `auto` takes a quantized folder as it is. Where it would compute in bfloat16 on a CPU that has
    kernels, it quantizes to int8: decoding is five times as fast, without a measurable loss
    (docs/performance.md). Raises `OptionError` for a precision other than the folder's, and
    `Unsupported` for one that the device has no linears for.
    """
    if bits := parse_precision(precision):
        precision = format_precision(bits)
    elif precision not in PRECISIONS:
        raise OptionError(
            f"unknown precision {precision!r}; choose {', '.join(PRECISIONS)}, or int8 and int4 "
            f"with tower, decoder or head set to int4, int8 or float, as in {PER_COMPONENT}"
        )
    checkpoint = Checkpoint.open(source)
    stored = checkpoint.precision
    if stored and precision not in ("auto", stored):
        raise OptionError(
            f"{checkpoint.folder} has {stored} weights; "
            f"for {precision} name the checkpoint that it was made from"
        )
    if quantized := stored or (precision if bits or precision in CUDA_ONLY else None):
        linear_cuda.check_supported(quantized, torch.device(device))
        float_component = 0 in (parse_precision(quantized) or {}).values()
        if float_component and device == "cpu" and not kernels.multiplies_bfloat16():
            return torch.float32, quantized
        return pick_dtype("auto", checkpoint, device, quantized=True), quantized
    dtype = pick_dtype(precision, checkpoint, device)
    int8_is_faster = (
        precision == "auto"
        and dtype == torch.bfloat16
        and device == "cpu"
        and kernels.unavailable_reason() is None
    )
    return dtype, "int8" if int8_is_faster else None


def warn_if_slow(precision: str | None, dtype: torch.dtype, device: str) -> None:
    """Warn where the device has no fast product for the weights."""
    on_cpu = device == "cpu"
    if (
        precision is None
        and dtype != torch.float32
        and on_cpu
        and not kernels.multiplies_bfloat16()
    ):
        name = str(dtype).removeprefix("torch.")
        faster = "float32 is" if kernels.unavailable_reason() else "int8 and float32 are"
        warnings.warn(
            f"this CPU has no fast products in {name}: {faster} a hundred times as fast",
            stacklevel=3,
        )
    if precision is None or precision in CUDA_ONLY:
        return
    if reason := _kernel_unavailable(torch.device(device), dtype):
        kernel = "compiled kernels" if on_cpu else "Triton kernels"
        warnings.warn(
            f"no {kernel} for {precision} ({reason}): "
            "it is many times slower than bfloat16 on this machine",
            stacklevel=3,
        )


def _kernel_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why int8 and int4 linears have no kernel on a device; None where they have one."""
    if device.type == "cpu":
        return kernels.unavailable_reason()
    return triton.unavailable_reason(device, dtype)


def linear_backend(model: Llava) -> str:
    """What computes the linears of a network."""
    precision, weight = quantized_precision(model), model.language_model.norm.weight
    if precision is None:
        return "PyTorch"
    if precision in CUDA_ONLY:
        return "bitsandbytes" if precision == "nf4" else "PyTorch's scaled product"
    if reason := _kernel_unavailable(weight.device, weight.dtype):
        return f"PyTorch, which dequantizes the weights at every call: {reason}"
    return "compiled kernels" if weight.is_cpu else "Triton kernels"


def pick_device(name: str, source: Source | None = None, precision: str = "auto") -> str:
    """`auto` is the current CUDA GPU if there is one and the network of `source` fits, else the
    CPU with a warning. Raises `Unsupported` for a device that is not available."""
    if name != "auto":
        return str(get_device(name))
    if not torch.cuda.is_available():
        return "cpu"
    if source and (reason := too_large(source, precision)):
        warnings.warn(
            f"{reason}: it runs on the CPU; use precision int4, or force device cuda",
            stacklevel=3,
        )
        return "cpu"
    return "cuda"


def too_large(source: Source, precision: str) -> str | None:
    """None where a checkpoint's network fits into the free memory of the current CUDA GPU, else
    the numbers."""
    checkpoint = Checkpoint.open(source)
    config, (dtype, quantized) = checkpoint.config, pick_precision(precision, checkpoint, "cuda")
    kv = min(MIN_KV_TOKENS, config.text.context) * bytes_per_token(config.text, dtype)
    need = weight_bytes(config, dtype, quantized) + kv + MIN_FREE_BYTES
    free, _ = torch.cuda.mem_get_info()
    if need <= free:
        return None
    name = quantized or str(dtype).removeprefix("torch.")
    return (
        f"the network needs {need / 2**30:.1f} GiB in {name}, "
        f"and the GPU has {free / 2**30:.1f} GiB free"
    )


def pick_dtype(
    precision: str, source: Source, device: str, *, quantized: bool = False
) -> torch.dtype:
    """The dtype of activations.

    `auto` is float32 for a small network, and on a CPU for one stored in float32 or without fast
    bfloat16; else bfloat16, or float16 on a GPU without it and on Apple's before macOS 14. A folder
    without tensors (estimates) counts as stored in 16 bits, as the published checkpoints are.
    quantized: its linears are, and their compiled layers take bfloat16, however small it is.
    """
    if precision != "auto":
        return named_dtype(precision)
    checkpoint = Checkpoint.open(source)
    if not quantized and checkpoint.config.num_parameters <= MAX_FLOAT32_PARAMETERS:
        return torch.float32
    if device.startswith("cuda"):
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if device == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16
    if not kernels.multiplies_bfloat16() and kernels.unavailable_reason() is not None:
        return torch.float32
    if next(checkpoint.folder.glob("*.safetensors"), None) is None:
        return torch.bfloat16
    stored = max(checkpoint.headers.values(), key=lambda tensor: tensor.bytes).dtype
    return torch.float32 if FLOATS.get(stored) == torch.float32 else torch.bfloat16


def kv_memory(model: Llava, precision: str = "auto", gpu_memory: float | None = None) -> int:
    """Bytes for the KV cache: two full contexts, one to keep while the other runs; on a CPU at most
    a quarter of the memory, on a CUDA GPU what the largest step leaves. gpu_memory: there as much
    as the fraction of its memory allows."""
    weight = model.language_model.norm.weight
    if weight.is_cuda:
        return profile_kv_bytes(model, kv_precision=precision, gpu_memory=gpu_memory)
    text = model.config.text
    wanted = 2 * text.context * bytes_per_token(text, weight.dtype, int8=precision == "int8")
    memory = 16 << 30
    if sys.platform != "win32" and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(wanted, memory // 4)
