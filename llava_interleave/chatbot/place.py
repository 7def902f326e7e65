"""Where a network runs and in which numbers, when nobody says."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from .. import kernels
from ..engine import bytes_per_token
from ..errors import OptionError
from ..model import Llava
from ..model.quantise import RECIPES
from ..weights import skeleton
from ..weights.files import read_config, read_headers, stored_precision
from ..weights.load import device_named
from ..weights.tensors import FLOATS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = 100_000_000
"""A network of at most this many parameters runs in float32: 400 MB at most, and exact."""


def named_dtype(name: str) -> torch.dtype:
    """float32, bfloat16 or float16 by name."""
    if name not in DTYPES:
        raise OptionError(f"{name!r} is no precision; there are {', '.join(DTYPES)}")
    return DTYPES[name]


def pick_precision(precision: str, folder: Path, device: str) -> tuple[torch.dtype, str | None]:
    """The type that is computed in, and what the weights of linears are quantised to, int4 or int8; None leaves them as they are.

    `auto` takes a quantised folder as it is and quantises no other. Raises `OptionError` for another precision than the folder's.
    """
    if precision not in ("auto", *DTYPES, *RECIPES):
        raise OptionError(f"{precision!r} is no precision; there are auto, {', '.join([*DTYPES, *RECIPES])}")
    held = stored_precision(folder)
    if held and precision not in ("auto", held):
        raise OptionError(f"{folder} holds {held} weights; for {precision} name the checkpoint that it was made from")
    if held or precision in RECIPES:
        return pick_dtype("auto", folder, device), held or precision
    return pick_dtype(precision, folder, device), None


def warn_if_slow(precision: str | None) -> None:
    """Say so where weights are quantised and there are no kernels for them."""
    if precision and (reason := kernels.why_not()):
        warnings.warn(f"no compiled kernels for {precision} ({reason}): it is many times slower than bfloat16 here", stacklevel=3)


def pick_device(name: str) -> str:
    """`auto` is the first CUDA GPU where there is one, else the CPU. Raises `Unsupported` for a device that is not here."""
    if name != "auto":
        return str(device_named(name))
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(precision: str, folder: Path, device: str) -> torch.dtype:
    """`auto`: float32 for a small network, and on a CPU for one stored in it; else bfloat16, or float16 on a GPU without that.

    A folder whose tensors were not fetched counts as stored in 16 bits, as the published checkpoints are.
    """
    if precision != "auto":
        return named_dtype(precision)
    if sum(parameter.numel() for parameter in skeleton(read_config(folder)).parameters()) <= SMALL:
        return torch.float32
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if next(folder.glob("*.safetensors"), None) is None:
        return torch.bfloat16
    stored = max(read_headers(folder).values(), key=lambda tensor: tensor.bytes).dtype
    return torch.float32 if FLOATS.get(stored) == torch.float32 else torch.bfloat16


def kv_memory(model: Llava, precision: str = "auto") -> int:
    """Bytes for keys and values: two full contexts, one to keep while the other runs; at most a quarter of the memory."""
    weight = model.language_model.norm.weight
    text = model.config.text
    wanted = 2 * text.context * bytes_per_token(text, weight.dtype, in_eight_bits=precision == "int8")
    if weight.is_cuda:
        return min(wanted, torch.cuda.mem_get_info(weight.device)[0] // 2)
    known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 16 << 30
    return min(wanted, memory // 4)
