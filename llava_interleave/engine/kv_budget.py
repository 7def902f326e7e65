"""Memory of the KV cache on a GPU: the free memory after the largest step, which is run once."""

from __future__ import annotations

import torch

from ..model import Llava, PackedAttention
from .kv_contiguous import bytes_per_token

MARGIN = 0.05
"""Fraction of the memory that stays free: CUDA graphs, fragmentation, first calls of libraries."""


def kv_bytes_left(free: int, total: int, peak: int, other_caches: int = 0) -> int:
    """Bytes for the KV cache, if `free` of `total` are free and a step needs up to `peak`."""
    return max(0, free - peak - other_caches - int(total * MARGIN))


def profile_kv_bytes(
    model: Llava,
    *,
    kv_precision: str = "auto",
    feature_bytes: int = 256 << 20,
    max_num_batched_tokens: int = 1024,
    max_batched_images: int = 8,
    max_num_seqs: int = 64,
) -> int:
    """`kv_bytes` for an `Engine` with these arguments on a GPU; at most `max_num_seqs` contexts."""
    weight = model.language_model.norm.weight
    device, text = weight.device, model.config.text
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run_largest_step(model, max_num_batched_tokens, max_batched_images, max_num_seqs)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    token = bytes_per_token(text, weight.dtype, int8=kv_precision == "int8")
    return min(max_num_seqs * text.context * token, kv_bytes_left(free, total, peak, feature_bytes))


@torch.inference_mode()
def run_largest_step(model: Llava, tokens: int, crops: int, num_logits: int) -> None:
    """Compute a step with so many crops, tokens and rows of logits."""
    weight, side = model.language_model.norm.weight, model.config.vision.image_size
    features = model.encode(weight.new_zeros(crops, 3, side, side)).flatten(0, 1)[:tokens]
    positions = torch.arange(tokens, device=weight.device)
    x = model.embed(torch.zeros_like(positions), [(0, features)])
    model.logits(model.forward(x, positions, PackedAttention([tokens]))[:num_logits])
