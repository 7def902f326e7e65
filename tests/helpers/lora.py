"""Shared by tests: see tests/test_lora.py."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_interleave import checkpoints
from llava_interleave.config import LoraConfig
from llava_interleave.lora import LoraAdapter, attach

DECODER = LoraConfig(rank=4, alpha=8.0, dropout=0.0)


def made(folder: Path, lora: LoraConfig, seed: int) -> LoraAdapter:
    """An adapter as training leaves it: B is no longer zero."""
    adapter = attach(checkpoints.load(folder), lora, seed)
    random = torch.Generator().manual_seed(seed)
    for part in adapter.parts.values():
        part.b.data.normal_(0, 0.3, generator=random)
    return adapter
