"""How much of a GPU's memory keys and values get: what is free beside the largest step, which is computed once to see."""

from __future__ import annotations

import torch

from ..model import Llava, PackedAttention
from .kv_contiguous import bytes_per_token

MARGIN = 0.05
"""Share of all memory that stays free: captured steps, memory in pieces, what other libraries take when first called."""


def kv_bytes_left(free: int, total: int, peak: int, beside: int = 0) -> int:
    """Bytes for keys and values where of `total` so many are free, a step takes up to `peak` and other caches `beside`."""
    return max(0, free - peak - beside - int(total * MARGIN))


def profile_kv_bytes(
    model: Llava,
    *,
    kv_precision: str = "auto",
    feature_bytes: int = 256 << 20,
    max_num_batched_tokens: int = 1024,
    max_batched_images: int = 8,
    max_num_seqs: int = 64,
) -> int:
    """Bytes for the keys and values of an `Engine` of a network on a GPU; the arguments are the engine's.

    At most a full context for each request that can run.
    """
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
    most = (
        max_num_seqs
        * text.context
        * bytes_per_token(text, weight.dtype, in_eight_bits=kv_precision == "int8")
    )
    return min(most, kv_bytes_left(free, total, peak, feature_bytes))


@torch.inference_mode()
def run_largest_step(model: Llava, tokens: int, crops: int, rows: int) -> None:
    """Compute the largest step: so many crops, so many tokens, the logits of so many."""
    weight, side = model.language_model.norm.weight, model.config.vision.image_size
    features = model.encode(weight.new_zeros(crops, 3, side, side)).flatten(0, 1)[:tokens]
    positions = torch.arange(tokens, device=weight.device)
    x = model.embed(torch.zeros_like(positions), [(0, features)])
    model.logits(model.forward(x, positions, PackedAttention([tokens]))[:rows])
