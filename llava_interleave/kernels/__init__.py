"""Compiled kernels for a CPU: quantized linears, attention, all layers of a decoder or a tower in
one call, and what training computes besides products."""

from . import training
from .binding import (
    GROUP,
    PANEL,
    SUBGROUP,
    KernelsUnavailable,
    group_bytes,
    multiplies_bfloat16,
    unavailable_reason,
)
from .ops import attend, decode, encode, linear

__all__ = [
    "GROUP",
    "PANEL",
    "SUBGROUP",
    "KernelsUnavailable",
    "attend",
    "decode",
    "encode",
    "group_bytes",
    "linear",
    "multiplies_bfloat16",
    "training",
    "unavailable_reason",
]
