"""Seconds and GB/s of every matrix of the decoder, and of attention, in each number type; as shares
of what memory gives.

    python bench/kernels.py [--shape 0.5b] [--tokens 1 8 1474] [--repeat 15] [--threads 2]

Prints the memory's reading speed, then a JSON line for each matrix, number of tokens and system:
median and spread (the middle half) of the milliseconds, GB/s of weights with their share of the
reading speed, and billions of operations a second. Systems take turns, and each reads copies of its
matrix in turn that no cache holds together. `attention` is that of 1 to 8 new tokens of a sequence
after 1,474 others, a layer, with a KV cache in the type that is named.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from shapes import SHAPES
from torch import Tensor, nn

from llava_interleave import kernels
from llava_interleave.bench import memory_bandwidth
from llava_interleave.config import TextConfig
from llava_interleave.engine.kv_contiguous import ContiguousKVCache, Span, _DecodeAttention
from llava_interleave.engine.prefix_cache import CacheKey, SequenceKV
from llava_interleave.quantization.linear_cpu import QuantizedLinear

BESIDE = 256 << 20  # bytes of copies, so that each is read from memory
CONTEXT = 1474
Call = Callable[[int], object]


def seconds(call: Call, turn: int) -> float:
    began = time.perf_counter()
    call(turn)
    return time.perf_counter() - began


def matrices(c: TextConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs."""
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    found = {
        "q_proj, o_proj": (queries, c.hidden_size),
        "k_proj, v_proj": (keys, c.hidden_size),
        "gate_proj, up_proj": (c.intermediate_size, c.hidden_size),
        "down_proj": (c.hidden_size, c.intermediate_size),
        "lm_head": (c.vocab_size, c.hidden_size),
    }
    return (
        found
        if queries != keys
        else {name: shape for name, shape in found.items() if name != "k_proj, v_proj"}
    )


def quantized(bits: int, out: int, features: int, x: Tensor) -> tuple[Call, int]:
    like = QuantizedLinear(features, out, bits, bias=False)
    size = like.weight.nbytes + like.scale.nbytes
    made = [QuantizedLinear(features, out, bits, bias=False) for _ in range(max(1, BESIDE // size))]
    for module in made:
        module.weight.random_(0, 256)
        module.scale.fill_(0.01)
    return lambda turn: made[turn % len(made)](x), size


def plain(dtype: torch.dtype, out: int, features: int, x: Tensor) -> tuple[Call, int]:
    size, x = out * features * dtype.itemsize, x.to(dtype)
    made = [
        torch.empty(out, features, dtype=dtype).normal_() for _ in range(max(1, BESIDE // size))
    ]
    return lambda turn: nn.functional.linear(x, made[turn % len(made)]), size


def attention(
    c: TextConfig, dtype: torch.dtype, new: int, *, compiled: bool = True, in_8_bits: bool = False
) -> tuple[Call, int]:
    """One layer of as many as there are; each has its own KV cache."""
    cache = ContiguousKVCache(c, dtype, torch.device("cpu"), int8=in_8_bits)
    kv = SequenceKV(CacheKey.of([]), 0, CONTEXT + 64)
    cache.prepare(kv)
    assert kv.contiguous is not None
    for layer in (tensor for tensors, _ in kv.contiguous.tensors() for tensor in tensors):
        layer.random_(-100, 100) if in_8_bits else layer.normal_()
    if not compiled:
        cache._decode_attention = _DecodeAttention
    attend = cache.attend([Span(kv, CONTEXT, CONTEXT + new)])
    q, k, v = (
        torch.randn(new, heads, c.head_dim, dtype=dtype)
        for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)
    )
    return lambda turn: attend(
        turn % c.num_layers, q, k, v
    ), cache.bytes_per_token // c.num_layers * CONTEXT


def rows(c: TextConfig, tokens: list[int], repeat: int) -> Iterator[dict[str, Any]]:
    for name, (out, features) in matrices(c).items():
        for count in tokens:
            if name == "lm_head" and count > 8:
                continue  # of a prompt only the last token needs logits
            x = torch.randn(count, features, dtype=torch.bfloat16)
            systems = {
                "int4": quantized(4, out, features, x),
                "int8": quantized(8, out, features, x),
                "torch bfloat16": plain(torch.bfloat16, out, features, x),
                "torch float32": plain(torch.float32, out, features, x),
            }
            yield from compared(
                f"{name} {out} x {features}", count, out * features * count * 2, systems, repeat
            )
    for new in (1, 2, 4, 8):
        systems = {
            "bfloat16": attention(c, torch.bfloat16, new),
            "int8": attention(c, torch.bfloat16, new, in_8_bits=True),
            "torch bfloat16": attention(c, torch.bfloat16, new, compiled=False),
            "torch float32": attention(c, torch.float32, new),
        }
        yield from compared(
            "attention", new, 4 * new * c.num_heads * c.head_dim * CONTEXT, systems, 4 * repeat
        )


def compared(
    what: str, tokens: int, work: int, systems: dict[str, tuple[Call, int]], repeat: int
) -> Iterator[dict[str, object]]:
    took: dict[str, list[float]] = {system: [] for system in systems}
    for turn in range(repeat + 1):
        for system, (call, _) in systems.items():
            took[system].append(seconds(call, turn))
    for system, (_, size) in systems.items():
        low, middle, high = statistics.quantiles(took[system][1:], n=4)
        yield {
            "matrix": what,
            "tokens": tokens,
            "system": system,
            "ms": round(middle * 1e3, 3),
            "spread": [round(low * 1e3, 3), round(high * 1e3, 3)],
            "GB/s": round(size / middle / 1e9, 1),
            "GOP/s": round(work / middle / 1e9),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="0.5b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, CONTEXT])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        speed = memory_bandwidth(torch.device("cpu"))
        about = {
            "threads": torch.get_num_threads(),
            "kernels": kernels.unavailable_reason() or "compiled",
        }
        print(json.dumps(about | {"memory GB/s": round(speed / 1e9, 1)}), flush=True)
        for row in rows(SHAPES[given.shape].text, given.tokens, given.repeat):
            print(json.dumps(row | {"share": round(row["GB/s"] * 1e9 / speed, 2)}), flush=True)


if __name__ == "__main__":
    main()
