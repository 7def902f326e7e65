"""Milliseconds of a decode step in which one sequence computes 1 to 9 tokens, of a prompt and of a crop, by precision.

    python bench/steps.py FOLDER [--precision int4 int8 bfloat16] [--kv auto int8] [--context 1474] [--repeat 20] [--prompts 3]

A JSON line for each precision, type of keys and values, and number of tokens: median and spread (the middle half), and the time
as a multiple of that of a single token: what guessed tokens cost. Then, `--prompts` times, a prompt as long as the context in the
pieces in which the engine computes it, and a crop through the tower. Quantised layers are computed in one call, and one by one
("by layer"). All take turns. On a machine that does other things too, give it one thread (OMP_NUM_THREADS=1) and take the time of
the processor (--processor).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llava_interleave import checkpoints
from llava_interleave.engine.kv_contiguous import ContiguousKVCache, Span, fusible
from llava_interleave.engine.prefix_cache import CacheKey, SequenceKV
from llava_interleave.model import Llava
from llava_interleave.quantization.fused import (
    FusedDecoder,
    FusedTower,
    can_fuse_decoder,
    can_fuse_tower,
)
from llava_interleave.quantization.linear import parse_precision

COUNTS = (1, 2, 3, 5, 9)
PIECE = 1024  # of a prompt, as the engine's `max_num_batched_tokens`


def step(
    model: Llava, context: int, in_eight_bits: bool, fused: FusedDecoder | None
) -> Callable[[int, int], None]:
    """A function that computes so many tokens from a place up to `context` on."""
    weight = model.language_model.norm.weight
    slabs = ContiguousKVCache(
        model.config.text, weight.dtype, weight.device, in_eight_bits=in_eight_bits
    )
    kv = SequenceKV(CacheKey.of([]), context, context + max(COUNTS))
    slabs.prepare(kv)
    assert kv.slab is not None
    for tensor in (tensor for tensors, _ in kv.slab.parts() for tensor in tensors):
        tensor.random_(-3, 4)

    def run(at: int, tokens: int) -> None:
        x, positions = model.embed(torch.arange(tokens)), torch.arange(at, at + tokens)
        span = Span(kv, at, at + tokens)
        hidden = (
            fused(x, positions, [fusible(span, min(tokens, max(COUNTS)))])
            if fused
            else model(x, positions, slabs.attend([span]))
        )
        model.logits(hidden[-max(COUNTS) :]).argmax(-1).tolist()

    return run


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", nargs="+", default=["int4", "int8", "bfloat16"])
    parser.add_argument("--kv", nargs="+", default=["auto", "int8"], choices=["auto", "int8"])
    parser.add_argument("--context", type=int, default=1474)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--processor", action="store_true")
    given = parser.parse_args()
    clock = time.process_time if given.processor else time.perf_counter
    systems, towers = {}, {}
    for precision in given.precision:
        few = precision if parse_precision(precision) else None
        model = checkpoints.load(
            given.folder, dtype=torch.bfloat16 if few else getattr(torch, precision), precision=few
        )
        for kv in given.kv:
            systems[precision, kv, "by layer"] = step(model, given.context, kv == "int8", None)
            if can_fuse_decoder(model.language_model):
                systems[precision, kv, "one call"] = step(
                    model, given.context, kv == "int8", FusedDecoder(model.language_model)
                )
        tower, shape = model.vision_tower, model.config.vision
        towers[precision, "by layer"] = tower
        if can_fuse_tower(tower, shape):
            towers[precision, "one call"] = FusedTower(tower, shape)
    took: dict[tuple[str, str, str, int], list[float]] = {}
    for turn in range(given.repeat + 1):
        for (precision, kv, how), run in systems.items():
            for tokens in COUNTS:
                began = clock()
                run(given.context, tokens)
                if turn:
                    took.setdefault((precision, kv, how, tokens), []).append(clock() - began)
    for (precision, kv, how, tokens), values in took.items():
        low, middle, high = statistics.quantiles(values, n=4)
        row = {
            "precision": precision,
            "kv": kv,
            "layers": how,
            "tokens": tokens,
            "ms": round(middle * 1e3, 2),
        }
        times = middle / statistics.median(took[precision, kv, how, 1])
        print(
            json.dumps(
                row
                | {"spread": [round(low * 1e3, 2), round(high * 1e3, 2)], "times": round(times, 2)}
            ),
            flush=True,
        )
    size = shape.image_size
    pixels = torch.rand(1, 3, size, size, dtype=torch.bfloat16) * 2 - 1
    whole: dict[tuple[str, ...], list[float]] = {}
    for _ in range(given.prompts):
        for about, run in systems.items():
            began = clock()
            for at in range(0, given.context, PIECE):
                run(at, min(PIECE, given.context - at))
            whole.setdefault(("prompt", *about), []).append(clock() - began)
        for about, see in towers.items():
            began = clock()
            see(pixels)
            whole.setdefault(("crop", *about), []).append(clock() - began)
    for what, values in whole.items():
        print(
            json.dumps({"what": what, "ms": [round(value * 1e3) for value in sorted(values)]}),
            flush=True,
        )


if __name__ == "__main__":
    main()
