"""The speed of a model on this machine, as fractions of the machine's peak compute and
bandwidth.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image

from .chat import Chatbot, Options
from .flops import decoder_bytes, prefill_flops, vision_flops
from .quantization.fused import can_fuse_decoder
from .quantization.replace import quantized_precision

SLOW_PRODUCT = 0.05
"""Seconds of a matrix product after which no larger one is tried."""
QUESTIONS = ("Describe every image.", "What differs between them?")


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric over all rounds. share: fraction of the machine's peak; None where
    there is none.
    """

    name: str
    unit: str
    median: float
    minimum: float
    maximum: float
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """The metrics, and the settings and machine of the run."""

    about: dict[str, object]
    figures: tuple[Figure, ...]


def measure(
    bot: Chatbot,
    *,
    images: int = 2,
    tokens: int = 64,
    rounds: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Ask about new images in every round, then a second question about them; after one warm-up
    round.

    tokens: length of each first answer. progress: called with the number of finished rounds, and of
    all. Raises the errors of `Chatbot.ask`.
    """
    timings = []
    for number in range(rounds + 1):
        if progress:
            progress(number, rounds + 1)
        timings.append(run_round(bot, images, tokens))
    times, model = timings[1:], bot.model
    weight = model.language_model.norm.weight
    compute_dtype = str(weight.dtype).removeprefix("torch.")
    peak = peak_memory(weight.device)  # before measuring the peaks allocates memory
    kinds = (
        ("int8", "bfloat16", "float32")
        if quantized_precision(model) and weight.is_cpu
        else (compute_dtype,)
    )  # a GPU multiplies floats
    products, kind = max((matmul_throughput(kind, weight.device), kind) for kind in kinds)
    bandwidth = memory_bandwidth(weight.device)
    prompt = int(times[0]["prompt"])
    peaks = {
        "vision": products / vision_flops(model.config),
        "prefill": products * prompt / prefill_flops(model.config, prompt),
        "decode": bandwidth
        / (decoder_bytes(model) + bot.engine.bytes_per_token * (prompt + tokens // 2)),
    }
    figures = (  # of the second question also the first token
        figure(
            "vision",
            "s an image",
            [row["vision"] / images for row in times],
            1 / peaks["vision"],
        ),
        figure(
            "prefill",
            "tokens/s",
            [row["prefilled"] / row["prefill"] for row in times],
            peaks["prefill"],
        ),
        figure("first token", "s", [row["first"] for row in times]),
        figure("decode", "tokens/s", [row["rate"] for row in times], peaks["decode"]),
        figure("second question", "s", [row["second"] for row in times]),
        figure("peak memory", "MiB", [peak / 2**20]),
    )
    about = bot.info() | {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "layers of a decoder": "one call"
        if can_fuse_decoder(model.language_model)
        else "one by one",
        "images": images,
        "prompt": prompt,
        "tokens": tokens,
        "rounds": rounds,
        "memory GB/s": round(bandwidth / 1e9, 1),
        f"{kind} GOP/s": round(products / 1e9),
    }
    return Report(about, figures)


def run_round(bot: Chatbot, images: int, tokens: int) -> dict[str, float]:
    """One round: numbers of tokens, seconds, and tokens per second of the answer."""
    inputs = random_images(images, bot.model.config.vision.image_size)
    options = Options(max_new_tokens=tokens, ignore_eos=True, prompt_lookup_num_tokens=0)
    start = time.perf_counter()
    answer = bot.ask(QUESTIONS[0], inputs, options)
    total, took, used = time.perf_counter() - start, answer.timings, answer.usage
    start = time.perf_counter()
    bot.ask(QUESTIONS[1], inputs, options, max_new_tokens=1)
    second = time.perf_counter() - start
    assert (
        took.prefill is not None
        and took.first_token is not None
        and took.tokens_per_second is not None
    )
    return {
        "prompt": used.prompt,
        "prefilled": used.prompt - used.cached,
        "vision": took.vision,
        "prefill": took.prefill,
        "first": total - (took.total - took.first_token),  # including the preprocessing of images
        "rate": took.tokens_per_second,
        "second": second,
    }


def random_images(count: int, side: int) -> list[Image.Image]:
    """Images that no cache has."""
    return [
        Image.fromarray(pixels)
        for pixels in np.random.default_rng().integers(0, 256, (count, side, side, 3), np.uint8)
    ]


def figure(name: str, unit: str, values: Sequence[float], peak: float | None = None) -> Figure:
    """The peak is in the unit of the values; in seconds it is the minimum."""
    median = statistics.median(values)
    share = None if peak is None else peak / median if unit.startswith("s") else median / peak
    return Figure(name, unit, median, min(values), max(values), share)


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second read from memory: the best of several sums over 512 MB."""
    numbers = torch.ones(64 << 20, dtype=torch.int64, device=device)
    return numbers.nbytes / fastest(numbers.sum, device)


def matmul_throughput(kind: str, device: torch.device, side: int = 2048) -> float:
    """Operations per second in matrix products of a number type: the best of several.

    Matrices are smaller than `side` where that is slow: a CPU without instructions for a type is
    hundreds of times slower in it.
    """
    dtype = torch.int8 if kind == "int8" else getattr(torch, kind)
    multiply = torch._int_mm if kind == "int8" else torch.mm
    size = min(256, side)
    while True:
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        seconds = fastest(partial(multiply, a, b), device)
        if size == side or seconds > SLOW_PRODUCT:
            return 2 * size**3 / seconds
        size = min(2 * size, side)


def fastest(call: Callable[[], object], device: torch.device, repeat: int = 5) -> float:
    """Seconds of the fastest of several calls."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return min(once() for _ in range(repeat))


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: on a GPU its tensors, else resident pages; 0 on
    Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
