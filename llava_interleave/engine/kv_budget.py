"""Memory of the KV cache on a GPU: the free memory after the largest step, which is run once next
to the CUDA graphs."""

from __future__ import annotations

import gc
import time

import torch

from ..lora import AdapterRouting
from ..model import Llava
from .encoder_cache import EncoderCache
from .kv_contiguous import bytes_per_token
from .kv_paged import KV_BLOCK_SIZE
from .model_runner import ModelRunner

CONTEXTS = 2
"""Contexts that a KV cache has room for by default: one to keep while the other runs."""
MARGIN = 0.05
"""Fraction of the memory that stays free: fragmentation, first calls of libraries."""


def default_batched_tokens(device: torch.device) -> int:
    """Tokens of a step. On a GPU a prompt with two images, some 1,500 tokens, is one step."""
    return 4096 if device.type == "cuda" else 1024


def kv_bytes_left(free: int, total: int, needed: int, share: float = 1.0, own: int = 0) -> int:
    """Bytes for the KV cache, if `free` of `total` are free and a step and other caches need
    `needed`; a model that has `own` bytes may take a share of the total."""
    return max(0, min(free - int(total * MARGIN), int(total * share) - own) - needed)


def profile_kv_bytes(
    model: Llava,
    *,
    kv_precision: str = "auto",
    gpu_memory: float | None = None,
    feature_bytes: int = 256 << 20,
    max_num_batched_tokens: int | None = None,
    max_batched_images: int = 8,
    max_num_seqs: int = 64,
) -> int:
    """`kv_bytes` for an `Engine` with these arguments on a GPU.

    gpu_memory: the fraction of the memory that the model may take, for at most `max_num_seqs`
    contexts; None: two contexts, as far as there is memory.
    """
    weight = model.language_model.norm.weight
    device, text, int8 = weight.device, model.config.text, kv_precision == "int8"
    tokens = min(max_num_batched_tokens or default_batched_tokens(device), text.context)
    per_token = bytes_per_token(text, weight.dtype, int8=int8)
    pool = (-(-tokens // KV_BLOCK_SIZE)) * KV_BLOCK_SIZE * per_token
    torch.cuda.empty_cache()
    free_before, _ = torch.cuda.mem_get_info(device)
    runner = ModelRunner(
        model,
        EncoderCache(0),
        AdapterRouting(),
        vocab=text.vocab_size,
        max_batched_images=max_batched_images,
        max_num_seqs=max_num_seqs,
        kv_bytes=pool,
        kv_block_size=KV_BLOCK_SIZE,
        kv_int8=int8,
        batch_invariant=False,
        clock=time.perf_counter,
    )
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    runner.largest_step(tokens, max_num_seqs)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    free += pool
    del runner
    gc.collect()
    torch.cuda.empty_cache()
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    own, needed = weights + free_before - free, peak + feature_bytes
    left = kv_bytes_left(free, total, needed, 1.0 if gpu_memory is None else gpu_memory, own)
    contexts = CONTEXTS if gpu_memory is None else max_num_seqs
    return min(contexts * text.context * per_token, left)
