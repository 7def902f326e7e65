"""Shared by tests: see tests/test_kv_contiguous.py."""

from __future__ import annotations

import torch

from llava_interleave.config import TextConfig
from llava_interleave.engine.kv_contiguous import (
    quantize_kv,
)


def config(heads: int = 4, kv_heads: int = 2, layers: int = 2) -> TextConfig:
    return TextConfig(num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=8)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Keys or values as they count when they are kept in 8 bits."""
    q, scale = quantize_kv(x)
    return q * scale.float()[..., None]
