"""How fast a model answers on this machine, and what share that is of what the machine gives."""

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

LONG = 0.05
"""Seconds of a product after which no larger one is tried."""
QUESTIONS = ("Describe every image.", "What differs between them?")


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity over all rounds. share: of the machine's ceiling; None where it has none."""

    name: str
    unit: str
    median: float
    least: float
    most: float
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured, with what, where, and the ceilings of that place."""

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
    """Ask about new pictures in every round, then something else about the same ones; a first round is not counted.

    tokens: of each first answer. progress: called with the rounds that are done, and all. Raises what `Chatbot.ask` does.
    """
    taken = []
    for number in range(rounds + 1):
        if progress:
            progress(number, rounds + 1)
        taken.append(ask(bot, images, tokens))
    times, model = taken[1:], bot.model
    weight = model.language_model.norm.weight
    computed = str(weight.dtype).removeprefix("torch.")
    peak = peak_memory(weight.device)  # before the ceilings take memory of their own
    kinds = (
        ("int8", "bfloat16", "float32")
        if quantized_precision(model) and weight.is_cpu
        else (computed,)
    )  # a GPU multiplies floats
    products, kind = max((product_speed(kind, weight.device), kind) for kind in kinds)
    read = reading_speed(weight.device)
    prompt = int(times[0]["prompt"])
    ceilings = {
        "vision": products / vision_flops(model.config),
        "prefill": products * prompt / prefill_flops(model.config, prompt),
        "decode": read
        / (decoder_bytes(model) + bot.engine.bytes_per_token * (prompt + tokens // 2)),
    }
    figures = (  # of the second question the first token too
        figure(
            "vision",
            "s an image",
            [row["vision"] / images for row in times],
            1 / ceilings["vision"],
        ),
        figure(
            "prefill",
            "tokens/s",
            [row["prefilled"] / row["prefill"] for row in times],
            ceilings["prefill"],
        ),
        figure("first token", "s", [row["first"] for row in times]),
        figure("decode", "tokens/s", [row["rate"] for row in times], ceilings["decode"]),
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
        "memory GB/s": round(read / 1e9, 1),
        f"{kind} GOP/s": round(products / 1e9),
    }
    return Report(about, figures)


def ask(bot: Chatbot, images: int, tokens: int) -> dict[str, float]:
    """One round: numbers of tokens, seconds, and tokens a second of the answer."""
    pictures = noise(images, bot.model.config.vision.image_size)
    options = Options(max_new_tokens=tokens, ignore_eos=True, prompt_lookup_num_tokens=0)
    began = time.perf_counter()
    answer = bot.ask(QUESTIONS[0], pictures, options)
    total, took, used = time.perf_counter() - began, answer.timings, answer.usage
    began = time.perf_counter()
    bot.ask(QUESTIONS[1], pictures, options, max_new_tokens=1)
    second = time.perf_counter() - began
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
        "first": total
        - (took.total - took.first_token),  # with what comes before the engine: pictures to crops
        "rate": took.tokens_per_second,
        "second": second,
    }


def noise(count: int, side: int) -> list[Image.Image]:
    """Pictures that no cache has seen."""
    return [
        Image.fromarray(picture)
        for picture in np.random.default_rng().integers(0, 256, (count, side, side, 3), np.uint8)
    ]


def figure(name: str, unit: str, values: Sequence[float], ceiling: float | None = None) -> Figure:
    """The ceiling is in the unit of the values; of seconds it is the least."""
    median = statistics.median(values)
    share = (
        None if ceiling is None else ceiling / median if unit.startswith("s") else median / ceiling
    )
    return Figure(name, unit, median, min(values), max(values), share)


def reading_speed(device: torch.device) -> float:
    """Bytes a second that are read from memory together: the best of several sums over 512 MB."""
    numbers = torch.ones(64 << 20, dtype=torch.int64, device=device)
    return numbers.nbytes / fastest(numbers.sum, device)


def product_speed(kind: str, device: torch.device, side: int = 2048) -> float:
    """Operations a second in products of matrices of a number type, int8 among them: the best of several. They are smaller than
    `side` where that would take long: a CPU without instructions for a type is hundreds of times slower in it."""
    dtype = torch.int8 if kind == "int8" else getattr(torch, kind)
    multiply = torch._int_mm if kind == "int8" else torch.mm
    now = min(256, side)
    while True:
        a, b = (torch.ones(now, now, dtype=dtype, device=device) for _ in range(2))
        took = fastest(partial(multiply, a, b), device)
        if now == side or took > LONG:
            return 2 * now**3 / took
        now = min(2 * now, side)


def fastest(call: Callable[[], object], device: torch.device, repeat: int = 5) -> float:
    """Seconds of the fastest of several calls."""

    def once() -> float:
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    return min(once() for _ in range(repeat))


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: on a GPU its tensors there, else resident pages; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
