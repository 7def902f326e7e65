"""Training speed: tokens a second and peak memory of our loop and of a plain one over transformers.

    python bench/train.py [--shape 0.5b] [--each 6] [--rounds 3] [--bfloat16] [--json FILE]
    python bench/train.py --until 0.5 [--bfloat16] [--json FILE]

Both train the same network (frozen tower, as in the stage with many images) on the same samples,
with the same optimizer, each in its own process; a turn is one pass over all samples, and turns
alternate. The plain loop pads the samples of a step to the longest, as trainers with batches of
samples do, and computes logits of the learnt tokens only; ours packs as many tokens as those have
on average. Samples are in memory: steps are measured, not data loading. Peak memory is that of the
process minus its memory after loading the network. It also reports MFU, the share of a measured
matrix product, and how full packed and padded batches are. Needs transformers.

--shape: medium, 48 samples of 1 to 10 images; or 0.5b, the widths of Interleave-Qwen 0.5B with 4
of its 24 decoder layers and 2 of 26 tower layers, 6 samples of 1 or 2 images.

--until measures the time to a loss instead: a network of the built-in model's shape with random
weights is trained on its world until a pass over all samples has this mean loss (nats a token).
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from llava_interleave.chat import BUILTIN
from llava_interleave.checkpoints import Checkpoint, load
from llava_interleave.config import LlavaConfig
from llava_interleave.flops import measured_flops
from llava_interleave.image_layout import ImageTokenLayout
from llava_interleave.prompt import Media, Prompt
from llava_interleave.testing import tiny_checkpoint, tiny_config, write_random
from llava_interleave.train.data.packing import collate, pack
from llava_interleave.train.loop import autocast, build_optimizers, keeping_freed_memory, train_step
from llava_interleave.train.losses import sft_loss
from llava_interleave.train.recipe import Recipe
from recipes.tiny_world.episodes import SCENARIOS
from recipes.tiny_world.lessons import Lesson, WorldExamples

CONFIG = tiny_config(
    vision={
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_layers": 4,
        "num_heads": 3,
        "image_size": 128,
        "patch_size": 16,
    },
    text={
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_layers": 6,
        "num_heads": 4,
        "num_kv_heads": 4,
        "vocab_size": 32000,
    },
)
WIDTHS_OF_05B = tiny_config(
    vision={
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_layers": 2,
        "num_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
    text={
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_layers": 4,
        "num_heads": 16,
        "num_kv_heads": 16,
        "vocab_size": 151_936,
    },
)
IMAGES = (1, 2, 2, 4, 8, 10)  # of a sample; as often in M4-Instruct there are two
WORLD_SAMPLES = 480


@dataclass(frozen=True)
class Shape:
    """A network, and samples of so many images, `each` a step of the plain loop."""

    config: LlavaConfig
    images: tuple[int, ...]
    samples: int
    each: int


SHAPES = {"medium": Shape(CONFIG, IMAGES, 48, 8), "0.5b": Shape(WIDTHS_OF_05B, (1, 2), 6, 2)}
RECIPE = Recipe(steps=10**6, lr=1e-4, warmup_ratio=0.0)  # the tower is frozen
SYSTEMS = ("plain", "ours")


def world_samples() -> list[Prompt]:
    """Conversations about images of the built-in model's world."""
    drawn = WorldExamples(BUILTIN, 0, (Lesson(math.inf, SCENARIOS, 3, 0.1),))
    return [drawn(number).prompt for number in range(WORLD_SAMPLES)]


def samples(shape: Shape) -> list[Prompt]:
    """Images, then text, whose end carries loss."""
    rng, random, made = Random(0), torch.Generator().manual_seed(0), []
    grid, side = shape.config.vision.grid, shape.config.vision.image_size
    for number in range(shape.samples):
        images = rng.choice(shape.images)
        text, loss_tokens = rng.randint(16, 96), rng.randint(4, 16)
        tokens = [shape.config.image_token_id] * (images * grid**2) + [
            rng.randrange(300) for _ in range(text)
        ]
        pixels = [torch.randn(1, 3, side, side, generator=random) for _ in range(images)]
        media = tuple(
            Media(p, ImageTokenLayout(grid), bytes([number, i]), i * grid**2)
            for i, p in enumerate(pixels)
        )
        made.append(
            Prompt(tokens, media, [i >= len(tokens) - loss_tokens for i in range(len(tokens))])
        )
    return made


Turn = Callable[[list[Prompt], int], tuple[float, float]]
"""A pass over samples in an order of this seed, -> the mean loss of its steps, and the operations
that they need (0 where it counts none)."""


def ours(folder: Path, recipe: Recipe, each: int) -> Turn:
    """A pass of our loop's steps."""
    network = load(folder).float().requires_grad_(True).train()
    optimizers = build_optimizers(network, recipe)
    number = 0

    def turn(given: list[Prompt], seed: int) -> tuple[float, float]:
        nonlocal number
        lengths, steps = [len(prompt) for prompt in given], []
        batches = pack(lengths, max(*lengths, sum(lengths) * each // len(given)))
        for group in Random(seed).sample(batches, len(batches)):
            batch = collate([given[i] for i in group])
            steps.append(train_step(network, sft_loss, [batch], optimizers, recipe, number))
            number += 1
        return fmean(step.loss for step in steps), sum(step.flops for step in steps)

    return turn


def plain(folder: Path, recipe: Recipe, each: int) -> Turn:
    """A pass of steps as a careful trainer makes them: batches of samples, padded to the longest,
    and logits of the learnt tokens."""
    from transformers import LlavaForConditionalGeneration

    network = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).train()
    for name, p in network.named_parameters():
        p.requires_grad_("vision_tower" not in name)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=recipe.lr, betas=(0.9, recipe.beta2), weight_decay=0.0, fused=True
    )

    def turn(given: list[Prompt], seed: int) -> tuple[float, float]:
        order, losses = Random(seed).sample(given, len(given)), []
        for first in range(0, len(order), each):
            batch = padded(order[first : first + each])
            labels = batch.pop("labels")[:, 1:]
            learnt = labels != -100
            with autocast(torch.device("cpu"), recipe.bfloat16):
                hidden = network.model(**batch).last_hidden_state[:, :-1]
                logits = network.lm_head(hidden[learnt])
            loss = nn.functional.cross_entropy(logits.float(), labels[learnt])
            loss.backward()
            nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return fmean(losses), 0.0

    return turn


def padded(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    def rows(of: Callable[[Prompt], list[int]], fill: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(
            [torch.tensor(of(p)) for p in prompts], batch_first=True, padding_value=fill
        )

    def labels(prompt: Prompt) -> list[int]:
        return [
            token if flag else -100
            for token, flag in zip(prompt.tokens, prompt.loss_mask or [], strict=True)
        ]

    return {
        "input_ids": rows(lambda p: p.tokens, 0),
        "attention_mask": rows(lambda p: [1] * len(p), 0),
        "labels": rows(labels, -100),
        "pixel_values": torch.cat([media.pixels for p in prompts for media in p.media]),
    }


def work(
    system: str, folder: Path, shape: Shape | None, bfloat16: bool, threads: int, pipe: Connection
) -> None:
    """A system's process: seconds of a turn, peak bytes, loss and MFU, for each seed that comes.

    Both take denormal numbers as zero, as `llava train` does.
    """
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    given = samples(shape) if shape else world_samples()
    recipe = replace(RECIPE, bfloat16=bfloat16, lr=RECIPE.lr if shape else 1e-3)
    turn = {"ours": ours, "plain": plain}[system](folder, recipe, shape.each if shape else 8)
    loaded, product = peak(), torch.bfloat16 if bfloat16 else torch.float32
    device = torch.device("cpu")
    with keeping_freed_memory(device) if system == "ours" else nullcontext():
        while (seed := pipe.recv()) is not None:
            speed = measured_flops(device, product)
            began = time.perf_counter()
            loss, flops = turn(given, seed)
            seconds = time.perf_counter() - began
            pipe.send((seconds, peak() - loaded, loss, flops / seconds / speed))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def systems(
    shape: Shape | None, bfloat16: bool
) -> Iterator[Callable[[str, int], tuple[float, int, float, float]]]:
    """A function that makes a system take a turn: seconds, peak bytes, loss and MFU. Without a
    shape: of the built-in model, on its world."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        if shape:
            tiny_checkpoint(folder, shape.config)
        else:
            write_random(folder, Checkpoint.open(BUILTIN).config, BUILTIN)
        context, pipes, processes = get_context("spawn"), {}, []
        for system in SYSTEMS:
            pipes[system], there = context.Pipe()
            given = (system, folder, shape, bfloat16, torch.get_num_threads(), there)
            process = context.Process(target=work, args=given, daemon=True)
            process.start()
            there.close()
            processes.append(process)

        def turn(system: str, seed: int) -> tuple[float, int, float, float]:
            pipes[system].send(seed)
            found: tuple[float, int, float, float] = pipes[system].recv()
            return found

        yield turn
        for system, process in zip(SYSTEMS, processes, strict=True):
            pipes[system].send(None)
            process.join()


def until(loss: float, bfloat16: bool) -> dict[str, Any]:
    """Seconds and passes until a loss; systems take turns while both are above it."""
    found: dict[str, list[tuple[float, float]]] = {system: [] for system in SYSTEMS}
    with systems(None, bfloat16) as turn:
        for seed in count():
            above = [
                system for system in SYSTEMS if not found[system] or found[system][-1][1] > loss
            ]
            if not above:
                break
            for system in above:
                seconds, _, reached, _ = turn(system, seed)
                found[system].append((seconds, reached))
                print(
                    f"pass {seed + 1} {system}: {seconds:.1f} s, loss {reached:.3f}",
                    file=sys.stderr,
                    flush=True,
                )
    for system, turns in found.items():
        total = sum(seconds for seconds, _ in turns)
        print(f"{system:<8}{total:>8.1f} s to a loss of {loss}, {len(turns)} passes")
    return {
        system: {"seconds": [s for s, _ in turns], "losses": [each for _, each in turns]}
        for system, turns in found.items()
    }


def measure(shape: Shape, rounds: int, bfloat16: bool) -> dict[str, Any]:
    given = samples(shape)
    tokens, loss_tokens = sum(len(p) for p in given), sum(sum(p.loss_mask or []) for p in given)
    found: dict[str, list[tuple[float, int, float, float]]] = {system: [] for system in SYSTEMS}
    with systems(shape, bfloat16) as turn:
        for seed in range(rounds + 1):  # the first warms up
            for system in SYSTEMS:
                found[system].append(turn(system, seed))
    result: dict[str, Any] = {
        "samples": len(given),
        "tokens": tokens,
        "loss_tokens": loss_tokens,
        "threads": torch.get_num_threads(),
    }
    for system, turns in found.items():
        seconds = [s for s, *_ in turns[1:]]
        result[system] = {
            "tokens_per_s": tokens / median(seconds),
            "loss_tokens_per_s": loss_tokens / median(seconds),
            "seconds": seconds,
            "peak_bytes": turns[-1][1],
        }
    result["speed"] = median(
        a / b for (a, *_), (b, *_) in zip(found["plain"][1:], found["ours"][1:], strict=True)
    )
    result["mfu"] = median(mfu for *_, mfu in found["ours"][1:])
    result["memory"] = found["ours"][-1][1] / found["plain"][-1][1]
    return result


def filling() -> dict[str, float]:
    """The filled fraction of batches, packed and padded in fours, with M4-Instruct's lengths."""
    rng = Random(0)
    lengths = [rng.choice(IMAGES) * 729 + rng.randint(40, 400) for _ in range(12_800)]
    windows = [lengths[i : i + 128] for i in range(0, len(lengths), 128)]
    batches = sum(len(pack(window, 32_768)) for window in windows)
    fours = sum(4 * max(lengths[i : i + 4]) for i in range(0, len(lengths), 4))
    return {"packed": sum(lengths) / (batches * 32_768), "padded": sum(lengths) / fours}


def speed(given: argparse.Namespace) -> dict[str, Any]:
    shape = SHAPES[given.shape]
    shape = replace(shape, each=given.each or shape.each)
    found = measure(shape, given.rounds, given.bfloat16) | {
        "each": shape.each,
        "filling": filling(),
        "bfloat16": given.bfloat16,
    }
    print(f"{'':<8}{'tokens/s':>12}{'loss tok/s':>12}{'peak MiB':>12}   seconds a pass")
    for system in SYSTEMS:
        one = found[system]
        turns = " ".join(f"{s:.1f}" for s in one["seconds"])
        figures = (one["tokens_per_s"], one["loss_tokens_per_s"], one["peak_bytes"] / 2**20)
        print(f"{system:<8}" + "".join(f"{figure:>12,.0f}" for figure in figures) + f"   {turns}")
    print(
        f"ours has {found['speed']:.2f} times the speed and {found['memory']:.2f} of the memory, "
        f"MFU {found['mfu']:.0%}"
    )
    print(
        f"filled: packed {found['filling']['packed']:.1%}, padded {found['filling']['padded']:.1%}"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns of each, after one that warms up"
    )
    parser.add_argument("--shape", choices=SHAPES, default="medium", help="of the network")
    parser.add_argument("--each", type=int, help="samples a step; default: the shape's")
    parser.add_argument(
        "--bfloat16", action="store_true", help="multiply matrices in bfloat16, in both"
    )
    parser.add_argument("--until", type=float, metavar="LOSS", help="measure the time to this loss")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    given = parser.parse_args()
    found = until(given.until, given.bfloat16) if given.until else speed(given)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
