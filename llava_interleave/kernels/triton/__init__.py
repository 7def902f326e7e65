"""Triton kernels of a GPU: one function per kernel, each with its formula and shapes.

On the meta device a call is only counted (`count_launches`). Importing this package needs no
Triton."""

from .launch import count_launches
from .ops import (
    LayerKV,
    PackedWeight,
    SamplingTensors,
    add_layer_norm,
    add_rms_norm,
    dequantize,
    packed_linear,
    paged_attention,
    paged_decode,
    rope_table,
    rotary_kv_write,
    sample,
    silu_mul,
    varlen_attention,
)
from .reference import PROMPT_TOKEN

__all__ = [
    "PROMPT_TOKEN",
    "LayerKV",
    "PackedWeight",
    "SamplingTensors",
    "add_layer_norm",
    "add_rms_norm",
    "count_launches",
    "dequantize",
    "packed_linear",
    "paged_attention",
    "paged_decode",
    "rope_table",
    "rotary_kv_write",
    "sample",
    "silu_mul",
    "varlen_attention",
]
