"""One workload on this machine in one run, systems taking turns: this package at each precision, transformers, and others.

    python bench/make_checkpoint.py /tmp/half --shape 0.5b
    python bench/peers.py /tmp/half [--minutes 7.5] [--systems "llava int4" "transformers bfloat16"] [--out docs/bench/latest.json]
    python bench/page.py docs/bench/latest.json docs/bench/index.html

Each in turn is started, asked everything and ended, so that nothing else is in memory; once, whatever it takes, then again as
often as --minutes allow. Every question has new pictures but where it says that they are the same; all systems get the same
ones. Systems in float32 take several times as long, and by default answer about one image only, unless the processor has no
products in bfloat16: then those of that type are left out. --also NAME=COMMAND: another system, a command that speaks as
bench/systems.py does.

--out: system -> figure -> median, least, most, how often, and the share of the machine's ceiling, measured in the same run: for
pictures and prompts the fastest matrix product of any number type, for decoding the memory's reading speed by what the system
must read, measured anew before each is started, for others on the same host may take of it. Linux only.
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

from llava_interleave import checkpoints, kernels
from llava_interleave.bench import matmul_throughput, memory_bandwidth
from llava_interleave.checkpoints.files import read_config
from llava_interleave.cli import terminal
from llava_interleave.config import LlavaConfig
from llava_interleave.flops import prefill_flops, vision_flops
from llava_interleave.quantization.precision import parse_precision

HERE = Path(__file__).parent
FLOATS = (
    ["bfloat16", "float32"] if kernels.multiplies_bfloat16() else ["float32"]
)  # the fastest first
IN_FLOATS = [f"{name} {kind}" for kind in FLOATS for name in ("llava", "transformers")]
SYSTEMS, BRIEF = ["llava int4 kv8", "llava int4", "llava int8", *IN_FLOATS], IN_FLOATS[2:]
QUESTIONS = ("Describe every image.", "What differs between them?", "And in this one?")
SIZE = (1024, 768)  # pixels of a picture
SHORT, LONG = 32, 64  # tokens of an answer, and of each of several at once

Found = dict[str, tuple[float, float | None]]
"""By figure its value, and the share of the ceiling where there is one."""


@dataclass(frozen=True)
class Machine:
    """Ceilings: bytes a second from memory, operations a second in products by number type."""

    config: LlavaConfig
    read: float
    products: dict[str, float]

    def least(self, images: int, prompt: int = 0) -> float:
        """Seconds that these images and a prompt take at best."""
        work = images * vision_flops(self.config) + (
            prefill_flops(self.config, prompt) if prompt else 0
        )
        return work / max(self.products.values())

    def tokens(self, about: dict[str, int], context: float) -> float:
        """Tokens a second after so many, at best."""
        return self.read / (about["weights"] + about["kv"] * context)


class System:
    """A process of bench/systems.py, or one that speaks as it does."""

    def __init__(self, command: list[str]) -> None:
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
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"{shlex.join(self.process.args)} ended with {self.process.wait()}; run it by hand to see why"
            )
        return json.loads(line)

    def answer(self, *chats: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
        """Timings, as bench/systems.py tells them."""
        print(json.dumps({"chats": chats, "tokens": tokens}), file=self.process.stdin, flush=True)
        return self.read()

    def peak(self) -> int:
        """Most resident bytes so far, of weights in mapped files too."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Pictures:
    """Files of pictures; each turn has its own, the same for every system."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.turn, self.made = folder, 0, 0

    def start(self, turn: int) -> None:
        self.turn, self.made = turn, 0

    def __call__(self, count: int) -> list[str]:
        paths = [self.folder / f"{self.turn}-{self.made + index}.jpg" for index in range(count)]
        self.made += count
        for path in paths:
            if not path.exists():
                pixels = np.random.default_rng(list(path.name.encode())).integers(
                    0, 256, (24, 32, 3), np.uint8
                )
                Image.fromarray(pixels).resize(SIZE, Image.Resampling.BICUBIC).save(path)
        return [str(path) for path in paths]


def user(pictures: list[str], question: str) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [
            *({"type": "image", "path": path} for path in pictures),
            {"type": "text", "text": question},
        ],
    }


def one_image(system: System, machine: Machine, new: Pictures) -> Found:
    took = system.answer([user(new(1), QUESTIONS[0])], tokens=SHORT)
    return first_token(took, machine, 1) | vision(took, machine, 1)


def conversation(system: System, machine: Machine, new: Pictures) -> Found:
    pictures = new(2)
    turn = user(pictures, QUESTIONS[0])
    took = system.answer([turn], tokens=SHORT)
    again = system.answer([user(pictures, QUESTIONS[1])], tokens=1)
    said = {"role": "assistant", "content": [{"type": "text", "text": "They differ in colour."}]}
    more = system.answer([turn, said, user(new(1), QUESTIONS[2])], tokens=1)
    found = (
        first_token(took, machine, 2)
        | vision(took, machine, 2)
        | decode(took, machine, system.about, "2 images")
    )
    if took["prefill"] is not None:
        share = (machine.least(2, took["prompt"]) - machine.least(2)) / took["prefill"]
        found["prefill of 2 images, tokens/s"] = took["prompt"] / took["prefill"], share
    return found | {
        "second question about the same 2 images, s to first token": (again["first"], None),
        "one more image in the conversation, s to first token": (more["first"], None),
        "peak memory after all that, MiB": (system.peak() / 2**20, None),
    }


def many_images(system: System, machine: Machine, new: Pictures) -> Found:
    took = system.answer([user(new(8), QUESTIONS[0])], tokens=SHORT)
    return first_token(took, machine, 8) | decode(took, machine, system.about, "8 images")


def many_requests(system: System, _: Machine, new: Pictures) -> Found:
    took = system.answer(
        *([user(new(1), f"{index}: {QUESTIONS[0]}")] for index in range(8)), tokens=LONG
    )
    return {
        "8 requests with an image each, tokens/s from question to last answer": (
            8 * LONG / took["total"],
            None,
        )
    }


def first_token(took: dict[str, Any], machine: Machine, images: int) -> Found:
    share = machine.least(images, took["prompt"]) / took["first"]
    return {f"first token, {images} image{'s' * (images > 1)}, s": (took["first"], share)}


def vision(took: dict[str, Any], machine: Machine, images: int) -> Found:
    return (
        {"vision, s an image": (took["vision"] / images, machine.least(images) / took["vision"])}
        if took["vision"]
        else {}
    )


def decode(took: dict[str, Any], machine: Machine, about: dict[str, int], after: str) -> Found:
    rate = (SHORT - 1) / (took["total"] - took["first"])
    return {
        f"decode after {after}, tokens/s": (
            rate,
            rate / machine.tokens(about, took["prompt"] + SHORT / 2),
        )
    }


Work = Callable[[System, Machine, Pictures], Found]
WORK: dict[str, Work] = {
    "one": one_image,
    "conversation": conversation,
    "images": many_images,
    "requests": many_requests,
}


class Bench:
    """What has been found. Systems are started, asked and ended one after another, so that none takes another's memory."""

    def __init__(
        self, commands: dict[str, list[str]], brief: list[str], machine: Machine, scratch: Path
    ) -> None:
        self.commands, self.brief, self.machine, self.pictures = (
            commands,
            brief,
            machine,
            Pictures(scratch),
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
        self.pictures.start(0)
        question, began = user(self.pictures(1), QUESTIONS[0]), time.perf_counter()
        system = System(self.commands[name])
        loaded = time.perf_counter() - began
        took = system.answer([question], tokens=8)
        self.written[name] = took["written"]
        yield "cold process to first token, 1 image, s", (loaded + took["first"], None)
        for turn, one in enumerate(work, 1):
            self.pictures.start(turn)
            yield from WORK[one](system, machine, self.pictures).items()
        system.close()


def summary(bench: Bench) -> dict[str, dict[str, dict[str, float | None]]]:
    """By system and figure."""
    return {
        name: {figure: told(values) for figure, values in found.items()}
        for name, found in bench.found.items()
    }


def told(values: list[tuple[float, float | None]]) -> dict[str, float | None]:
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
    """How many of a first answer's tokens each has in common with the last system, before the first that differs."""
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
        help="those that answer about one image only",
    )
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--work", nargs="*", default=list(WORK), choices=list(WORK))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    end = time.perf_counter() + 60 * given.minutes
    config = read_config(given.folder)
    device, kinds = torch.device("cpu"), ("float32", "bfloat16", "int8")
    machine = Machine(
        config, memory_bandwidth(device), {kind: matmul_throughput(kind, device) for kind in kinds}
    )
    with tempfile.TemporaryDirectory() as scratch:
        commands = {}
        for name in given.systems:
            kind, precision, *more = name.split()
            folder = given.folder
            if parse_precision(precision):
                folder = Path(scratch) / precision
                if not folder.exists():
                    checkpoints.save(
                        checkpoints.load(given.folder, precision=precision),
                        folder,
                        processor_from=given.folder,
                    )
            commands[name] = [
                sys.executable,
                str(HERE / "systems.py"),
                kind,
                str(folder),
                precision,
                *more,
            ]
        for name, _, command in (also.partition("=") for also in given.also):
            commands[name] = shlex.split(command)
        bench = Bench(commands, given.brief, machine, Path(scratch))
        about = dict(versions()) | {"processor": cpu(), "threads": torch.get_num_threads()}
        took = 0.0
        while not took or time.perf_counter() + took <= end:
            began = time.perf_counter()
            bench.round(given.work)
            took = time.perf_counter() - began
            result = {
                "about": about,
                "ceilings": ceilings(machine, bench.reads),
                "network": asdict(config),
                "first tokens as the last system": agreement(bench.written),
                "systems": summary(bench),
            }
            if given.out:
                given.out.write_text(json.dumps(result, indent=1) + "\n")
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
