"""Training speed: tokens a second and peak memory of our loop and of a plain one over transformers.

    python bench/train.py [--rounds 3] [--bfloat16] [--json FILE]
    python bench/train.py --until 0.5 [--bfloat16] [--json FILE]

Both train the same network of middle size (frozen tower, as in the stage with many images) on the
same samples, with the same optimizer, each in its own process; a turn is one pass over all samples,
and turns alternate. The plain loop takes 8 samples a step and pads them to the longest, as trainers
with batches of samples do; ours packs as many tokens as those have on average. Samples are in
memory: steps are measured, not data loading. Peak memory is that of the process minus its memory
after loading the network. It also reports how full packed and padded batches are. Needs
transformers.

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
from contextlib import contextmanager
from dataclasses import replace
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
from llava_interleave.image_layout import ImageTokenLayout
from llava_interleave.prompt import Media, Prompt
from llava_interleave.testing import tiny_checkpoint, tiny_config, write_random
from llava_interleave.train.data.packing import collate, pack
from llava_interleave.train.loop import autocast, build_optimizers, train_step
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
GRID = CONFIG.vision.grid
IMAGES = (1, 2, 2, 4, 8, 10)  # of a sample; as often in M4-Instruct there are two
SAMPLES, WORLD_SAMPLES, EACH = 48, 480, 8
RECIPE = Recipe(steps=10**6, lr=1e-4, warmup_ratio=0.0)  # the tower is frozen
SYSTEMS = ("plain", "ours")


def world_samples() -> list[Prompt]:
    """Conversations about images of the built-in model's world."""
    drawn = WorldExamples(BUILTIN, 0, (Lesson(math.inf, SCENARIOS, 3, 0.1),))
    return [drawn(number).prompt for number in range(WORLD_SAMPLES)]


def samples() -> list[Prompt]:
    """Images, then text, whose end carries loss."""
    rng, random, made = Random(0), torch.Generator().manual_seed(0), []
    for number in range(SAMPLES):
        images, text, loss_tokens = rng.choice(IMAGES), rng.randint(16, 96), rng.randint(4, 16)
        tokens = [CONFIG.image_token_id] * (images * GRID**2) + [
            rng.randrange(300) for _ in range(text)
        ]
        side = CONFIG.vision.image_size
        pixels = [torch.randn(1, 3, side, side, generator=random) for _ in range(images)]
        media = tuple(
            Media(p, ImageTokenLayout(GRID), bytes([number, i]), i * GRID**2)
            for i, p in enumerate(pixels)
        )
        made.append(
            Prompt(tokens, media, [i >= len(tokens) - loss_tokens for i in range(len(tokens))])
        )
    return made


Turn = Callable[
    [list[Prompt], int], float
]  # a pass over samples in an order of this seed, -> the mean loss of its steps


def ours(folder: Path, recipe: Recipe) -> Turn:
    """A pass of our loop's steps."""
    network = load(folder).float().requires_grad_(True).train()
    optimizers = build_optimizers(network, recipe)
    number = 0

    def turn(given: list[Prompt], seed: int) -> float:
        nonlocal number
        lengths, losses = [len(prompt) for prompt in given], []
        batches = pack(lengths, sum(lengths) * EACH // len(given))
        for group in Random(seed).sample(batches, len(batches)):
            losses.append(
                train_step(
                    network,
                    sft_loss,
                    [collate([given[i] for i in group])],
                    optimizers,
                    recipe,
                    number,
                ).loss
            )
            number += 1
        return fmean(losses)

    return turn


def plain(folder: Path, recipe: Recipe) -> Turn:
    """A pass of steps as a trainer makes them: batches of samples, padded to the longest."""
    from transformers import LlavaForConditionalGeneration

    network = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).train()
    for name, p in network.named_parameters():
        p.requires_grad_("vision_tower" not in name)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=recipe.lr, betas=(0.9, recipe.beta2), weight_decay=0.0, fused=True
    )

    def turn(given: list[Prompt], seed: int) -> float:
        order, losses = Random(seed).sample(given, len(given)), []
        for first in range(0, len(order), EACH):
            with autocast(torch.device("cpu"), recipe.bfloat16):
                loss = network(**padded(order[first : first + EACH])).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return fmean(losses)

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
    system: str, folder: Path, world: bool, bfloat16: bool, threads: int, pipe: Connection
) -> None:
    """A system's process: seconds of a turn, peak bytes and loss, for each seed that comes."""
    torch.set_num_threads(threads)
    given = world_samples() if world else samples()
    recipe = replace(RECIPE, bfloat16=bfloat16, lr=1e-3 if world else RECIPE.lr)
    turn = {"ours": ours, "plain": plain}[system](folder, recipe)
    loaded = peak()
    while (seed := pipe.recv()) is not None:
        began = time.perf_counter()
        loss = turn(given, seed)
        pipe.send((time.perf_counter() - began, peak() - loaded, loss))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def systems(
    config: LlavaConfig, world: bool, bfloat16: bool
) -> Iterator[Callable[[str, int], tuple[float, int, float]]]:
    """A function that makes a system take a turn: seconds, peak bytes and loss."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write_random(folder, config, BUILTIN) if world else tiny_checkpoint(folder, config)
        context, pipes, processes = get_context("spawn"), {}, []
        for system in SYSTEMS:
            pipes[system], there = context.Pipe()
            given = (system, folder, world, bfloat16, torch.get_num_threads(), there)
            process = context.Process(target=work, args=given, daemon=True)
            process.start()
            there.close()
            processes.append(process)

        def turn(system: str, seed: int) -> tuple[float, int, float]:
            pipes[system].send(seed)
            found: tuple[float, int, float] = pipes[system].recv()
            return found

        yield turn
        for system, process in zip(SYSTEMS, processes, strict=True):
            pipes[system].send(None)
            process.join()


def until(loss: float, bfloat16: bool) -> dict[str, Any]:
    """Seconds and passes until a loss; systems take turns while both are above it."""
    found: dict[str, list[tuple[float, float]]] = {system: [] for system in SYSTEMS}
    with systems(Checkpoint.open(BUILTIN).config, True, bfloat16) as turn:
        for seed in count():
            above = [
                system for system in SYSTEMS if not found[system] or found[system][-1][1] > loss
            ]
            if not above:
                break
            for system in above:
                seconds, _, reached = turn(system, seed)
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


def measure(rounds: int, bfloat16: bool) -> dict[str, Any]:
    given = samples()
    tokens, loss_tokens = sum(len(p) for p in given), sum(sum(p.loss_mask or []) for p in given)
    found: dict[str, list[tuple[float, int]]] = {system: [] for system in SYSTEMS}
    with systems(CONFIG, False, bfloat16) as turn:
        for seed in range(rounds + 1):  # the first warms up
            for system in SYSTEMS:
                found[system].append(turn(system, seed)[:2])
    result: dict[str, Any] = {
        "samples": SAMPLES,
        "tokens": tokens,
        "loss_tokens": loss_tokens,
        "threads": torch.get_num_threads(),
    }
    for system, turns in found.items():
        seconds = [s for s, _ in turns[1:]]
        result[system] = {
            "tokens_per_s": tokens / median(seconds),
            "loss_tokens_per_s": loss_tokens / median(seconds),
            "seconds": seconds,
            "peak_bytes": turns[-1][1],
        }
    result["speed"] = median(
        a / b for (a, _), (b, _) in zip(found["plain"][1:], found["ours"][1:], strict=True)
    )
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
    found = measure(given.rounds, given.bfloat16) | {
        "filling": filling(),
        "bfloat16": given.bfloat16,
    }
    print(f"{'':<8}{'tokens/s':>12}{'loss tok/s':>12}{'peak MiB':>12}   seconds a pass")
    for system in SYSTEMS:
        one = found[system]
        turns = " ".join(f"{s:.1f}" for s in one["seconds"])
        figures = (one["tokens_per_s"], one["loss_tokens_per_s"], one["peak_bytes"] / 2**20)
        print(f"{system:<8}" + "".join(f"{figure:>12,.0f}" for figure in figures) + f"   {turns}")
    print(f"ours has {found['speed']:.2f} times the speed and {found['memory']:.2f} of the memory")
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
