"""Triton kernels of a GPU: one function per kernel, each with its formula and shapes.

A GPU and, under `TRITON_INTERPRET=1`, Triton's interpreter on a CPU run the kernels; on the meta
device a call only records its launches (`record_launches`), and elsewhere `reference` computes the
same by PyTorch's operators. Importing this package needs no Triton."""

from .checks import probe, unavailable_reason
from .launch import record_launches, specialization
from .ops import (
    MAX_FUSED_ROWS,
    LayerKV,
    PackedWeight,
    Product,
    SamplingTensors,
    add_layer_norm,
    add_rms_norm,
    dequantize,
    packed_linear,
    packed_product,
    paged_attention,
    paged_decode,
    rope_table,
    rotary_kv_write,
    sample,
    scale_rows,
    silu_mul,
    varlen_attention,
)
from .reference import PROMPT_TOKEN

__all__ = [
    "MAX_FUSED_ROWS",
    "PROMPT_TOKEN",
    "LayerKV",
    "PackedWeight",
    "Product",
    "SamplingTensors",
    "add_layer_norm",
    "add_rms_norm",
    "dequantize",
    "packed_linear",
    "packed_product",
    "paged_attention",
    "paged_decode",
    "probe",
    "record_launches",
    "rope_table",
    "rotary_kv_write",
    "sample",
    "scale_rows",
    "silu_mul",
    "specialization",
    "unavailable_reason",
    "varlen_attention",
]
