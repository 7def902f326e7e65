"""Operations and bytes that a network needs, the speed of a device in matrix products (MFU), peak
memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import cache
from itertools import chain

import torch
from torch import nn

from .config import EfficientNetConfig, LlavaConfig, VisionConfig
from .lora import LoraWeights
from .model import Llava
from .model.efficientnet import Conv

if sys.platform != "win32":
    import resource


def vision_flops(c: LlavaConfig) -> int:
    """Operations of tower and projector for a crop; a multiply-add is two."""
    v, hidden, tokens = c.vision, c.projector_hidden_size, c.vision.grid**2
    projector = (v.hidden_size + c.text.hidden_size) * hidden
    if isinstance(v, EfficientNetConfig):
        return 2 * (tokens * projector + sum(n * side**2 for n, side in v.convolutions))
    layer = (
        4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size + 2 * tokens * v.hidden_size
    )
    patches = 3 * v.patch_size**2 * v.hidden_size
    return 2 * tokens * (v.num_layers * layer + patches + projector)


def prefill_flops(c: LlavaConfig, tokens: int) -> int:
    """Operations of the decoder for a prompt (causal attention; logits of the last token only)."""
    t = c.text
    queries, keys = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    layer = (
        t.hidden_size * (2 * queries + 2 * keys + 3 * t.intermediate_size) + (tokens + 1) * queries
    )
    return 2 * (tokens * t.num_layers * layer + t.hidden_size * t.vocab_size)


def decoder_bytes(model: Llava) -> int:
    """Bytes of weights that a decode step reads."""
    parts = (model.language_model.layers, model.language_model.norm, model.lm_head)
    return sum(
        tensor.nbytes for part in parts for tensor in chain(part.parameters(), part.buffers())
    )


def training_flops(model: Llava, lengths: Sequence[int], images: int, rows: int) -> float:
    """Floating-point operations of a batch, forward and backward; a multiply-add is two.

    Counted are matrix products and attention. lengths: tokens of each sample. rows: how many have
    logits. Backward counts from the first part with trained weights on: once for inputs, once for
    trained weights. Recomputation (activation checkpointing) is not counted.
    """
    vision, text = model.config.vision, model.config.text
    patches = images * vision.grid**2
    seen = 0
    if isinstance(vision, VisionConfig):
        seen = 4 * patches * vision.grid**2 * vision.hidden_size * vision.num_layers
    read = (
        2 * sum(n * n for n in lengths) * text.num_heads * text.head_dim * text.num_layers
    )  # half of them are in the future
    total, flows = 0.0, False
    for part, units, attention in (
        (model.vision_tower, patches, seen),
        (model.multi_modal_projector, patches, 0),
        (model.language_model, sum(lengths), read),
        (model.lm_head, rows, 0),
    ):
        flows |= any(p.requires_grad for p in part.parameters())
        total += attention * (1 + 2 * flows)
        sides = [side for _, side in getattr(vision, "convolutions", ())]  # in order
        for module in part.modules():
            size, trained = _product(module)
            n = images * sides.pop(0) ** 2 if isinstance(module, Conv) else units
            total += 2 * n * size * (1 + flows + trained)
    return total


def _product(module: nn.Module) -> tuple[int, bool]:
    """Multiply-adds of a module for a token or a patch, and whether its weights are trained."""
    if isinstance(module, LoraWeights):
        return module.a.numel() + module.b.numel(), module.a.requires_grad
    if isinstance(module, nn.Conv2d):
        return module.weight.numel(), module.weight.requires_grad
    if isinstance(inputs := getattr(module, "in_features", None), int):  # of floats or quantized
        outputs, weight = module.out_features, module.weight
        assert isinstance(outputs, int) and isinstance(weight, torch.Tensor)
        return inputs * outputs, weight.requires_grad
    return 0, False


@cache
def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of large square matrices, the fastest of five."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        taken.append(time.perf_counter() - began)
    return 2 * side**3 / min(taken)


def peak_memory(device: torch.device) -> int:
    """Peak bytes: on a GPU of tensors, else of the process; 0 where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "win32":
        unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 0
