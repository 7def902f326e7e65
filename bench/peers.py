"""One workload on this machine, systems in turns: this package at each precision, transformers,
and others.

    python bench/make_checkpoint.py /tmp/half --shape 0.5b
    python bench/peers.py /tmp/half [--minutes 7.5] [--systems "llava int4"] [--out RESULT.json]
    python bench/page.py docs/bench/latest.json docs/bench/index.html

Each system in turn is started, gets all questions and is stopped, so that only one is in memory;
once in any case, then again as often as --minutes allow. All systems get the same images, new ones
for every question unless it says otherwise. Systems in float32 take several times as long and by
default answer about one image only, unless the processor has no bfloat16 instructions: then the
bfloat16 systems are left out. --also NAME=COMMAND: another system, with the protocol of
bench/systems.py.

--out: system -> figure -> median, least, most, number of measurements, and the share of the
machine's peak in the same run: for images and prompts the fastest matrix product of any number
type, for decoding the memory bandwidth by the bytes that the system must read. The bandwidth is
measured before each start, because other tenants of the host use it too. Linux only.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from video_memory import write_video

from llava_interleave import checkpoints, kernels
from llava_interleave.bench import matmul_throughput, memory_bandwidth
from llava_interleave.checkpoints import Checkpoint
from llava_interleave.cli import terminal
from llava_interleave.config import LlavaConfig
from llava_interleave.flops import prefill_flops, vision_flops
from llava_interleave.image_layout import anyres
from llava_interleave.quantization.precision import parse_precision

HERE = Path(__file__).parent
FLOATS = ["bfloat16", "float32"] if kernels.multiplies_bfloat16() else ["float32"]  # fastest first
IN_FLOATS = [f"{name} {kind}" for kind in FLOATS for name in ("llava", "transformers")]
SYSTEMS, BRIEF = ["llava int4 kv8", "llava int4", "llava int8", *IN_FLOATS], IN_FLOATS[2:]
QUESTIONS = ("Describe every image.", "What differs between them?", "And in this one?")
TEXT = "What does a cat do all day long, and why does it do that?"
SIZE = (1024, 768)  # pixels of an image
SHORT, LONG = 32, 64  # tokens of an answer, and of each of several at once

Figures = dict[str, tuple[float, float | None]]
"""Figure -> its value, and its share of the peak where there is one."""


@dataclass(frozen=True)
class Machine:
    """Peaks: bytes per second from memory, operations per second in products by number type."""

    config: LlavaConfig
    read: float
    products: dict[str, float]

    def crops(self, images: int) -> int:
        """How many crops of so many images the tower sees: OneVision tiles one alone."""
        if images != 1 or not self.config.arrangement.anyres:
            return images
        vision, arrangement = self.config.vision, self.config.arrangement
        return anyres(*SIZE, vision.image_size, vision.grid, arrangement=arrangement).crops

    def min_seconds(self, crops: int, prompt: int = 0) -> float:
        """Seconds for these crops and a prompt at the peak."""
        work = crops * vision_flops(self.config) + (
            prefill_flops(self.config, prompt) if prompt else 0
        )
        return work / max(self.products.values())

    def max_rate(self, about: dict[str, int], context: float) -> float:
        """Tokens per second after a context, at the peak."""
        return self.read / (about["weights"] + about["kv"] * context)


class System:
    """A process with the protocol of bench/systems.py."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        self.about = self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"{shlex.join(self.command)} ended with {self.process.wait()}; run it by "
                "hand to see why"
            )
        return json.loads(line)

    def answer(self, *chats: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
        """Timings, as in bench/systems.py."""
        print(json.dumps({"chats": chats, "tokens": tokens}), file=self.process.stdin, flush=True)
        return self.read()

    def peak(self) -> int:
        """Peak resident bytes, mapped weights included."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


class ImageFiles:
    """Image files; each turn has its own, the same for every system."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.turn, self.count = folder, 0, 0

    def start(self, turn: int) -> None:
        self.turn, self.count = turn, 0

    def __call__(self, count: int) -> list[str]:
        paths = [self.folder / f"{self.turn}-{self.count + index}.jpg" for index in range(count)]
        self.count += count
        for path in paths:
            if not path.exists():
                pixels = np.random.default_rng(list(path.name.encode())).integers(
                    0, 256, (24, 32, 3), np.uint8
                )
                Image.fromarray(pixels).resize(SIZE, Image.Resampling.BICUBIC).save(path)
        return [str(path) for path in paths]


def user(images: list[str], question: str) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [
            *({"type": "image", "path": path} for path in images),
            {"type": "text", "text": question},
        ],
    }


def text(system: System, machine: Machine, _: ImageFiles) -> Figures:
    """A question without an image."""
    timing = system.answer([user([], TEXT)], tokens=SHORT)
    return {
        "first token, no image, s": (timing["first"], None),
        **decode(timing, machine, system.about, "no image"),
        "peak memory after an image and a text, MiB": (system.peak() / 2**20, None),
    }


def one_image(system: System, machine: Machine, new_images: ImageFiles) -> Figures:
    timing = system.answer([user(new_images(1), QUESTIONS[0])], tokens=SHORT)
    return first_token(timing, machine, 1) | vision(timing, machine, 1)


def conversation(system: System, machine: Machine, new_images: ImageFiles) -> Figures:
    images = new_images(2)
    turn = user(images, QUESTIONS[0])
    timing = system.answer([turn], tokens=SHORT)
    again = system.answer([user(images, QUESTIONS[1])], tokens=1)
    said = {"role": "assistant", "content": [{"type": "text", "text": "They differ in color."}]}
    more = system.answer([turn, said, user(new_images(1), QUESTIONS[2])], tokens=1)
    found = (
        first_token(timing, machine, 2)
        | vision(timing, machine, 2)
        | decode(timing, machine, system.about, "2 images")
    )
    if timing["prefill"] is not None:
        share = (machine.min_seconds(2, timing["prompt"]) - machine.min_seconds(2)) / timing[
            "prefill"
        ]
        found["prefill of 2 images, tokens/s"] = timing["prompt"] / timing["prefill"], share
    return found | {
        "second question about the same 2 images, s to first token": (again["first"], None),
        "one more image in the conversation, s to first token": (more["first"], None),
        "peak memory after all that, MiB": (system.peak() / 2**20, None),
    }


def many_images(
    system: System, machine: Machine, new_images: ImageFiles, count: int = 8
) -> Figures:
    timing = system.answer([user(new_images(count), QUESTIONS[0])], tokens=SHORT)
    after = f"{count} images"
    return first_token(timing, machine, count) | decode(timing, machine, system.about, after)


def album(system: System, machine: Machine, new_images: ImageFiles) -> Figures:
    """32 images."""
    found = many_images(system, machine, new_images, 32)
    return found | {"peak memory after 32 images, MiB": (system.peak() / 2**20, None)}


def video(system: System, machine: Machine, new_images: ImageFiles, frames: int = 32) -> Figures:
    """A video; none for a checkpoint without `<video>`."""
    if machine.config.video_token_id is None:
        return {}
    path = new_images.folder / f"{new_images.turn}-{frames}.mp4"
    write_video(path, frames, offset=new_images.turn)
    part = {"type": "video", "path": str(path), "frames": frames}
    turn = {"role": "user", "content": [part, {"type": "text", "text": QUESTIONS[0]}]}
    timing = system.answer([turn], tokens=SHORT)
    share = machine.min_seconds(frames, timing["prompt"]) / timing["first"]
    name = f"video of {frames} frames"
    return {
        f"first token, {name}, s": (timing["first"], share),
        **decode(timing, machine, system.about, name),
        f"peak memory after a {name}, MiB": (system.peak() / 2**20, None),
    }


def long_video(system: System, machine: Machine, new_images: ImageFiles) -> Figures:
    return video(system, machine, new_images, 64)


def many_requests(system: System, _: Machine, new_images: ImageFiles) -> Figures:
    timing = system.answer(
        *([user(new_images(1), f"{index}: {QUESTIONS[0]}")] for index in range(8)), tokens=LONG
    )
    return {
        "8 requests with an image each, tokens/s from question to last answer": (
            8 * LONG / timing["total"],
            None,
        )
    }


def first_token(timing: dict[str, Any], machine: Machine, images: int) -> Figures:
    share = machine.min_seconds(machine.crops(images), timing["prompt"]) / timing["first"]
    return {f"first token, {images} image{'s' * (images > 1)}, s": (timing["first"], share)}


def vision(timing: dict[str, Any], machine: Machine, images: int) -> Figures:
    return (
        {
            "vision, s an image": (
                timing["vision"] / images,
                machine.min_seconds(machine.crops(images)) / timing["vision"],
            )
        }
        if timing["vision"]
        else {}
    )


def decode(timing: dict[str, Any], machine: Machine, about: dict[str, int], after: str) -> Figures:
    rate = (SHORT - 1) / (timing["total"] - timing["first"])
    return {
        f"decode after {after}, tokens/s": (
            rate,
            rate / machine.max_rate(about, timing["prompt"] + SHORT / 2),
        )
    }


Work = Callable[[System, Machine, ImageFiles], Figures]
WORK: dict[str, Work] = {
    "one": one_image,
    "text": text,
    "conversation": conversation,
    "images": many_images,
    "video": video,
    "requests": many_requests,
    "album": album,
    "long-video": long_video,
}


class Bench:
    """The results. One system at a time is in memory."""

    def __init__(
        self, commands: dict[str, list[str]], brief: list[str], machine: Machine, scratch: Path
    ) -> None:
        self.commands, self.brief, self.machine, self.images = (
            commands,
            brief,
            machine,
            ImageFiles(scratch),
        )
        self.found: dict[str, dict[str, list[tuple[float, float | None]]]] = {
            name: {} for name in commands
        }
        self.written: dict[str, list[int]] = {}
        self.reads: list[float] = []

    def round(self, work: list[str]) -> None:
        for name in self.commands:
            for figure, value in self.ask(name, ["one"] if name in self.brief else work):
                self.found[name].setdefault(figure, []).append(value)
                print(f"{name}: {figure}: {value[0]:.4g}", file=sys.stderr, flush=True)

    def ask(self, name: str, work: list[str]) -> Iterator[tuple[str, tuple[float, float | None]]]:
        self.reads.append(memory_bandwidth(torch.device("cpu")))
        machine = replace(self.machine, read=self.reads[-1])
        self.images.start(0)
        question, start = user(self.images(1), QUESTIONS[0]), time.perf_counter()
        system = System(self.commands[name])
        loaded = time.perf_counter() - start
        timing = system.answer([question], tokens=8)
        self.written[name] = timing["written"]
        yield "cold process to first token, 1 image, s", (loaded + timing["first"], None)
        for turn, one in enumerate(work, 1):
            self.images.start(turn)
            yield from WORK[one](system, machine, self.images).items()
        system.close()


def summary(bench: Bench) -> dict[str, dict[str, dict[str, float | None]]]:
    """By system and figure."""
    return {
        name: {figure: statistics_of(values) for figure, values in found.items()}
        for name, found in bench.found.items()
    }


def statistics_of(values: list[tuple[float, float | None]]) -> dict[str, float | None]:
    numbers, shares = zip(*values, strict=True)
    return {
        "median": statistics.median(numbers),
        "least": min(numbers),
        "most": max(numbers),
        "times": len(numbers),
        "share": None if shares[0] is None else statistics.median(shares),
    }


def ceilings(machine: Machine, reads: list[float]) -> dict[str, float]:
    read = {
        name: of(reads) / 1e9
        for name, of in (("", statistics.median), (", least", min), (", most", max))
    }
    return {f"memory, GB/s{name}": value for name, value in read.items()} | {
        f"{kind}, GOP/s": value / 1e9 for kind, value in machine.products.items()
    }


def agreement(written: dict[str, list[int]]) -> dict[str, int]:
    """How many tokens of the first answer equal those of the last system, before the first
    difference.
    """
    last = list(written.values())[-1]
    return {
        name: sum(1 for _ in takewhile(lambda p: p[0] == p[1], zip(ids, last, strict=True)))
        for name, ids in written.items()
    }


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(": ")[1] for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def versions() -> Iterator[tuple[str, str]]:
    for name in ("llava-interleave", "torch", "transformers"):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument(
        "--systems", nargs="*", default=SYSTEMS, metavar="NAME", help=f"of {SYSTEMS}"
    )
    parser.add_argument(
        "--brief",
        nargs="*",
        default=BRIEF,
        metavar="NAME",
        help="systems that answer about one image only",
    )
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--work", nargs="*", default=list(WORK)[:5], choices=list(WORK))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    end = time.perf_counter() + 60 * args.minutes
    config = Checkpoint.open(args.folder).config
    device, kinds = torch.device("cpu"), ("float32", "bfloat16", "int8")
    machine = Machine(
        config, memory_bandwidth(device), {kind: matmul_throughput(kind, device) for kind in kinds}
    )
    with tempfile.TemporaryDirectory() as scratch:
        commands = {}
        for name in args.systems:
            kind, precision, *more = name.split()
            folder = args.folder
            if parse_precision(precision):
                folder = Path(scratch) / precision
                if not folder.exists():
                    checkpoints.save(
                        checkpoints.load(args.folder, precision=precision),
                        folder,
                        processor_from=args.folder,
                    )
            commands[name] = [
                sys.executable,
                str(HERE / "systems.py"),
                kind,
                str(folder),
                precision,
                *more,
            ]
        for name, _, command in (also.partition("=") for also in args.also):
            commands[name] = shlex.split(command)
        bench = Bench(commands, args.brief, machine, Path(scratch))
        about = dict(versions()) | {"processor": cpu(), "threads": torch.get_num_threads()}
        timing = 0.0
        while not timing or time.perf_counter() + timing <= end:
            start = time.perf_counter()
            bench.round(args.work)
            timing = time.perf_counter() - start
            result: dict[str, Any] = {
                "about": about,
                "ceilings": ceilings(machine, bench.reads),
                "network": asdict(config),
                "first tokens as the last system": agreement(bench.written),
                "systems": summary(bench),
            }
            if args.out:
                args.out.write_text(json.dumps(result, indent=1) + "\n")
    columns = list(result["systems"])
    figures = dict.fromkeys(figure for found in result["systems"].values() for figure in found)
    cells = {
        (name, figure): f"{one['median']:.4g}"
        for name, found in result["systems"].items()
        for figure, one in found.items()
    }
    terminal.table(
        "medians",
        ["", *columns],
        [[figure, *(cells.get((name, figure), "") for name in columns)] for figure in figures],
    )


if __name__ == "__main__":
    main()
